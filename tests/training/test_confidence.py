"""A network adapted to a task, and the calibration of its confidence on validation classes."""

import json

import pytest
import torch
from torch import nn

from maml_lightning import MAML, Classifier, ConvNet, Episode, GlyphsDataModule, SettingError, load
from maml_lightning.analysis.calibration import confidences, numbers_of
from maml_lightning.trained import strip
from maml_lightning.training.checkpoints import read_checkpoint
from maml_lightning.training.confidence import TaskNetwork, calibrate, calibration_of, task_outputs
from tests.runs import run

SMALL = {"in_channels": 1, "out_features": 3, "hidden_channels": 8, "blocks": 3}
WEIGHTS = [1.0, 0.1, 0.2, -0.3, 0.4]


def module(head: str = "prototypes", statistics: str = "support", **settings: object) -> MAML:
    net = ConvNet(**SMALL)  # type: ignore[arg-type]
    return MAML(net, inner_lr=0.01, head=head, query_statistics=statistics, **settings).eval()  # type: ignore[arg-type]


def calibrated(maml: MAML) -> MAML:
    names = ("head", "query_statistics", "eval_inner_steps")
    maml.calibration = {"weights": WEIGHTS, "settings": {name: getattr(maml, name) for name in names}}
    return maml


SUPPORT, TARGETS = torch.rand(6, 1, 28, 28), torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("statistics", ["support", "batch"])
@pytest.mark.parametrize("head", ["prototypes", "learned"])
def test_confidence_follows_from_logits_and_features(head, statistics):
    maml, queries = calibrated(module(head, statistics)), torch.rand(4, 1, 28, 28)
    adapted = maml.adapt(SUPPORT, TARGETS).eval()
    found = TaskNetwork(maml, SUPPORT, TARGETS)
    for query, probabilities, confidence in zip(queries, *found.alone(queries), strict=True):
        inputs = torch.cat([SUPPORT, query[None]]) if statistics == "batch" else query[None]
        logits, features = adapted(inputs)[-1:], adapted.body(inputs).mean((2, 3))[-1:]
        norms = features.square().sum(-1) if head == "prototypes" else None
        expected = confidences(WEIGHTS, numbers_of(logits, norms, torch.tensor([2, 3, 1])))
        assert torch.allclose(probabilities, logits.softmax(-1)[0], atol=1e-6)
        assert confidence.item() == pytest.approx(expected.item(), abs=1e-5)
    alone = found.alone(queries)
    assert torch.equal(torch.cat([found.alone(query[None]).confidences for query in queries]), alone.confidences)
    assert (statistics == "support") == torch.allclose(found.together(queries).probabilities, alone.probabilities)


def test_without_a_calibration_it_is_the_highest_probability():
    maml = module()
    probabilities, sure = TaskNetwork(maml, SUPPORT, TARGETS).alone(torch.rand(4, 1, 28, 28))
    assert torch.equal(sure, probabilities.amax(-1))
    batch = Episode(SUPPORT[None], TARGETS[None], SUPPORT[None], TARGETS[None])
    assert task_outputs(maml, batch) is None
    assert task_outputs(calibrated(maml), batch).confidences.shape == (6,)


def test_a_calibration_is_of_settings_and_weights():
    maml = calibrated(module())
    assert calibration_of(maml) == WEIGHTS
    maml.eval_inner_steps += 1
    assert calibration_of(maml) is None
    maml.eval_inner_steps -= 1
    assert calibration_of(maml) == WEIGHTS
    maml.training_step(Episode(SUPPORT[None], TARGETS[None], SUPPORT[None], TARGETS[None]), 0)
    assert maml.calibration is None


def glyphs(**settings: int) -> GlyphsDataModule:
    return GlyphsDataModule(**{"val_classes": 24, "train_classes": 24, "ways": 16, "shots": 2, **settings})


@pytest.mark.parametrize(("head", "statistics"), [("prototypes", "support"), ("learned", "batch")])
def test_calibrated_on_validation_classes_it_says_how_often_it_is_right(head, statistics):
    maml, data = module(head, statistics), glyphs(seed=1)
    data.setup("validate")
    queries = calibrate(maml, data.val_dataloader(), 20)
    sizes = [2, 4, 8] if head == "prototypes" else [2, 3]
    assert queries == 20 * sum(2 * size * 2 for size in sizes)
    assert maml.calibration["settings"] == {"head": head, "query_statistics": statistics, "eval_inner_steps": 1}
    sure, right = [], []
    other = glyphs(seed=2, shots=1)
    other.setup("validate")
    for number in range(40):
        support, targets, inputs, classes = other.datasets["val"][number]
        chosen, asked = targets < 3, classes < 6
        outputs = TaskNetwork(maml, support[chosen], targets[chosen]).alone(inputs[asked])
        sure.append(outputs.confidences)
        right.append(outputs.probabilities.argmax(-1) == classes[asked])
    rate = torch.cat(right).double().mean().item()  # 0.17 at chance, as half of the queries are of no class
    assert torch.cat(sure).mean().item() == pytest.approx(rate, abs=0.12)


def test_what_does_not_calibrate_is_named():
    with pytest.raises(SettingError, match=r"at least 4 classes \(got 3\); raise data.ways"):
        calibrate(module(), [Episode(SUPPORT[None], TARGETS[None], SUPPORT[None], TARGETS[None])], 1)
    maml = MAML(nn.Linear(2, 1))
    values = torch.rand(1, 5, 1)
    with pytest.raises(SettingError, match=r"needs episodes of classification"):
        calibrate(maml, [Episode(torch.rand(1, 5, 2), values, torch.rand(1, 5, 2), values)], 1)
    with pytest.raises(SettingError, match=r"needs episodes of validation classes \(got none\)"):
        calibrate(maml, [], 1)


def test_the_command_writes_a_checkpoint_that_is_calibrated(checkpoint, folder):
    words = ("calibrate", f"--ckpt_path={checkpoint}", "--data=GlyphsDataModule", "--data.ways=6")
    words += ("--data.val_classes=8", "--data.train_classes=8", "--episodes=3", "--output=sure.ckpt")
    ended = run(*words)
    assert ended.returncode == 0, ended.stderr
    assert "Calibrated on 18 queries. Written: sure.ckpt" in ended.stderr
    before, after = read_checkpoint(checkpoint), read_checkpoint(folder / "sure.ckpt")
    assert before.keys() == after.keys()
    assert before["calibration"] is None
    found = after["calibration"]
    assert calibration_of(load(folder / "sure.ckpt")) == found["weights"]
    assert calibration_of(load(folder / "sure.ckpt", eval_inner_steps=7)) is None
    strip(folder / "sure.ckpt", folder / "small.ckpt")
    assert load(folder / "small.ckpt").calibration == json.loads(json.dumps(found))
    again = run(*words)
    assert again.stderr.strip() == "error: output: sure.ckpt exists already; remove it or give another name."


def test_reject_says_once_that_nothing_is_calibrated(caplog):
    maml = module()
    maml.inputs = load("omniglot").inputs
    drawings = {"a": [torch.rand(28, 28)], "b": [torch.rand(28, 28)]}
    Classifier(maml, drawings, reject=0.6)
    Classifier(calibrated(maml), drawings, reject=0.6)([torch.rand(28, 28)] * 3)
    assert [record.getMessage() for record in caplog.records if "calibration" in record.getMessage()] == [
        "reject 0.6 compares the highest probability, which can be high for a query of none of the classes: the "
        "checkpoint has no calibration for its settings; maml-lightning calibrate adds one."
    ]
