"""A metric of the user's choice: what it is called, its value for each episode, and where it is logged."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score, MultilabelAUROC
from torchmetrics.functional.classification import multiclass_f1_score

from cli import main
from maml_lightning import MAML, Episode, SettingError, TestReport
from maml_lightning.training.metrics import metric_name, metric_scores
from tests.runs import DATA, TINY, words
from tests.structures import CASES, episode_of

F1 = {"model.metric": "torchmetrics.F1Score", "model.metric.task": "multiclass", "model.metric.num_classes": 3}


def gap(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.sum(-1) - targets).mean().item()


def test_names():
    assert metric_name(torchmetrics.F1Score(task="multiclass", num_classes=3)) == "multiclass_f1_score"
    assert metric_name(torchmetrics.MeanSquaredError()) == "mean_squared_error"
    assert metric_name(torchmetrics.R2Score()) == "r2_score"
    assert metric_name(MultilabelAUROC(3)) == "multilabel_auroc"
    assert metric_name(gap) == "gap"
    assert metric_name(functools.partial(gap, targets=1)) == "gap"
    assert metric_name(lambda outputs, targets: 0) == "lambda"


def test_each_episode_is_computed_afresh():
    torch.manual_seed(0)
    outputs, targets = [torch.randn(4, 9, 3) for _ in range(2)], torch.randint(3, (4, 9))
    metric = MulticlassF1Score(3)
    metric.update(outputs[0][0], targets[0])  # what it was used for before does not count, nor is it forgotten
    before = metric.compute()
    found = metric_scores(metric, outputs, targets)
    expected = [[multiclass_f1_score(step[task], targets[task], 3) for step in outputs] for task in range(4)]
    assert torch.equal(found, torch.tensor(expected))
    metric._computed = None
    assert metric.compute() == before
    by_function = metric_scores(functools.partial(multiclass_f1_score, num_classes=3), outputs, targets)
    assert torch.equal(by_function, found)


def test_labels_that_are_floats_reach_metrics_of_classification_as_integers():
    outputs, labels = [torch.randn(2, 9, 3)], torch.randint(2, (2, 9, 3))
    found = metric_scores(MultilabelAUROC(3), outputs, labels.float())
    assert torch.equal(found, metric_scores(MultilabelAUROC(3), outputs, labels))
    numbers = torch.rand(2, 9, 3)
    expected = [[F.mse_loss(o, t).item()] for o, t in zip(outputs[0], numbers, strict=True)]
    assert torch.allclose(metric_scores(torchmetrics.MeanSquaredError(), outputs, numbers), torch.tensor(expected))


def test_processes_do_not_wait_for_each_other_within_an_episode():
    def collective(*_, **__) -> None:
        raise AssertionError("another process may have no such episode")

    metric = MulticlassF1Score(3, distributed_available_fn=lambda: True, dist_sync_fn=collective)
    outputs, targets = torch.randn(2, 9, 3), torch.randint(3, (2, 9))
    assert torch.equal(
        metric_scores(metric, [outputs], targets), metric_scores(MulticlassF1Score(3), [outputs], targets)
    )
    assert metric.distributed_available_fn()


def results_of(maml: MAML, episodes: list[Episode], folder: Path) -> tuple[dict, dict]:
    """What is logged by a test, and its results."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[TestReport()],
    )
    (logged,) = trainer.test(maml, DataLoader(episodes, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return logged, json.loads((folder / "test_results.json").read_text())


def test_a_metric_is_logged_and_reported_beside_the_score(tmp_path):
    case = CASES["dict"]
    maml = MAML(case.net(), inner_lr=0.5, inner_steps=2, metric=MulticlassF1Score(3))
    episodes = [episode_of(case) for _ in range(2)]
    logged, results = results_of(maml, episodes, tmp_path)
    values = torch.cat([metric_scores(maml.metric, maml.trajectory(e), e.query_targets) for e in episodes]).double()
    for step, mean in enumerate(values.mean(0).tolist()):
        assert logged[f"test/multiclass_f1_score_step_{step}"] == pytest.approx(mean)
    assert logged["test/multiclass_f1_score"] == logged["test/multiclass_f1_score_step_2"]
    assert {"test/loss", "test/accuracy", "test/accuracy_step_0", "test/accuracy_step_2"} <= set(logged)
    assert results["multiclass_f1_score"] == pytest.approx(values[:, -1].mean().item(), abs=1e-6)
    assert results["multiclass_f1_score_ci95"] == pytest.approx(1.96 * values[:, -1].std().item() / 6**0.5, abs=1e-6)
    assert results["multiclass_f1_score_per_step"] == pytest.approx(values.mean(0).tolist(), abs=1e-6)
    assert results["accuracy"] == pytest.approx(logged["test/accuracy"], abs=1e-6)
    assert (results["episodes"], len(results["accuracy_per_step"])) == (6, 3)


def test_a_metric_is_the_headline_where_there_is_no_score(tmp_path):
    case = CASES["labels"]
    episodes = [episode_of(case)]
    metric = torchmetrics.F1Score(task="multilabel", num_labels=3)
    logged, results = results_of(MAML(case.net(), loss=case.loss, metric=metric), episodes, tmp_path)
    assert set(logged) == {"test/loss", *(f"test/multilabel_f1_score{end}" for end in ("", "_step_0", "_step_1"))}
    assert {"multilabel_f1_score", "ci95", "multilabel_f1_score_per_step"} <= set(results)
    logged, results = results_of(MAML(case.net(), loss=case.loss), episodes, tmp_path)
    assert set(logged) == {"test/loss", "test/loss_step_0", "test/loss_step_1"}
    assert results["loss"] == pytest.approx(logged["test/loss"], abs=1e-6)


def test_a_metric_that_is_called_as_the_score_is_logged_in_its_place(tmp_path):
    def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(0.25)

    case = CASES["dict"]
    logged, results = results_of(MAML(case.net(), metric=accuracy), [episode_of(case)], tmp_path)
    assert (logged["test/accuracy"], results["accuracy"]) == (0.25, 0.25)


def test_episodes_that_a_metric_is_not_defined_of_keep_their_accuracy(tmp_path):
    def sometimes(outputs: Tensor, targets: Tensor) -> float:
        return torch.nan if targets[0] == 0 else 0.5

    x, y = torch.rand(4, 5, 4), torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 1, 0, 1, 1]])
    logged, results = results_of(MAML(nn.Linear(4, 2), metric=sometimes), [Episode(x, y, x, y)], tmp_path)
    assert (logged["test/sometimes"], results["sometimes"], results["sometimes_episodes"]) == (0.5, 0.5, 2)
    assert results["episodes"] == 4
    assert "skipped" not in results


def dictionary(outputs: Tensor, targets: Tensor) -> dict:
    return {"a": 1.0}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            MulticlassF1Score(3, average="none"),
            r"model.metric multiclass_f1_score gives \[3\], not one number; average",
        ),
        (dictionary, r"model.metric dictionary gives \{a: float\}, not one number"),
        (
            torchmetrics.MeanSquaredError(),
            r"model.metric mean_squared_error cannot be computed from outputs \[5, 3\] and",
        ),
        (torchmetrics.F1Score, r"model.metric F1Score cannot be created without arguments .*--model.metric.NAME"),
        ("accuracy", r"model.metric must be a torchmetrics metric or a function .*got 'accuracy'"),
        (functools.partial(F.mse_loss, reduction="none"), r"model.metric mse_loss cannot be computed from outputs"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(metric, message):
    with pytest.raises(SettingError, match=message) as error:
        MAML(CASES["dict"].net(), metric=metric).training_step(episode_of(CASES["dict"]), 0)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Using a target size")  # PyTorch goes on
def test_a_metric_that_would_broadcast_is_refused():
    x, y = torch.rand(2, 4, 4), torch.tensor([[0, 1, 2, 3]] * 2)
    with pytest.raises(
        SettingError, match=r"metric mse_loss cannot be .* \[4, 4\] and targets \[4\] int64 \(Using a t"
    ):
        MAML(nn.Linear(4, 4), metric=F.mse_loss).training_step(Episode(x, y, x, y), 0)


def test_a_metric_called_loss_is_refused():
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    with pytest.raises(SettingError, match=r"model.metric loss would be logged as the loss is"):
        MAML(nn.Linear(1, 2), metric=loss)


def test_a_class_that_needs_no_arguments_is_created():
    assert isinstance(MAML(nn.Linear(1, 1), metric=torchmetrics.MeanSquaredError).metric, torchmetrics.MeanSquaredError)


@pytest.mark.usefixtures("folder")
def test_a_metric_on_the_command_line_its_checkpoint_and_its_resumption(folder: Path):
    cli = main(words("fit", **TINY, **F1))
    assert {"val/multiclass_f1_score", "val/multiclass_f1_score_step_2"} <= set(cli.trainer.callback_metrics)
    last = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    loaded = MAML.load_from_checkpoint(last)
    assert isinstance(loaded.metric, MulticlassF1Score)
    saved = words("validate", config=folder / "lightning_logs" / "version_0" / "config.yaml", ckpt_path=last)
    assert "val/multiclass_f1_score" in main(saved).trainer.callback_metrics
    main(words("test", **DATA, ckpt_path=last))  # the checkpoint's metric
    (results,) = folder.glob("lightning_logs/*/test_results.json")
    assert "multiclass_f1_score_ci95" in json.loads(results.read_text())
    by_function = {"model.metric": "torchmetrics.functional.mean_squared_error"}
    with pytest.raises(SettingError, match=r"model.metric mean_squared_error cannot be computed from outputs \[3, 3\]"):
        main(words("fit", **{**TINY, **by_function, "trainer.max_epochs": 2}, ckpt_path=last))
    resumed = main(words("fit", **{**TINY, "model.metric": "null", "trainer.max_epochs": 2}, ckpt_path=last))
    assert resumed.model.metric is None
    assert resumed.trainer.global_step == 2 * cli.trainer.global_step


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("metric", "torchmetrics.F1Scor", "no attribute 'F1Scor'; give a class of torchmetrics, or a function of"),
        ("metric", "nowhere.f1", "No module named 'nowhere'; give a class of torchmetrics, or a function of"),
        ("loss", "torch.nn.functional.los", "has no attribute 'los'; give a function of .outputs, targets. such"),
    ],
)
def test_a_path_that_names_nothing_is_one_line(setting, value, message, capsys):
    with pytest.raises(SystemExit):
        main(words("fit", **{**TINY, f"model.{setting}": value}))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(rf"error: model.{setting} {value}: .*{message}", line)


def with_setting(trained, folder, name, value):
    """The checkpoint of a run, which names something else."""
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"][name] = value
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize(
    "metric",
    [
        "os.system",
        "torch.nn.functional.mse_loss",
        {"class_path": "torchmetrics.text.BERTScore", "init_args": {}},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
        {"class_path": "torchmetrics.MeanSquaredError", "init_args": {"dist_sync_fn": "os.system"}},
        3,
    ],
)
def test_a_checkpoint_names_no_metric_of_others(metric, trained, tmp_path):
    changed = with_setting(trained, tmp_path, "metric", metric)
    with pytest.raises(SettingError, match=r"names metric|names \w+(\.\w+)* 'os.system'"):
        MAML.load_from_checkpoint(changed)
    by_hand = MAML.load_from_checkpoint(changed, metric=None)
    assert by_hand.metric is None


LABEL_SMOOTHING = {"model.loss": "torch.nn.CrossEntropyLoss", "model.loss.label_smoothing": 0.25}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("by", ["flags", "config"])
def test_a_loss_with_arguments_on_the_command_line_its_checkpoint_and_its_config(folder: Path, by: str):
    flags = LABEL_SMOOTHING
    if by == "config":
        loss = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.25}}
        (folder / "own.yaml").write_text(yaml.dump({"model": {"loss": loss}}))
        flags = {"config": "own.yaml"}
    cli = main(words("fit", **TINY, **flags))
    assert cli.model.loss.label_smoothing == 0.25
    assert cli.trainer.checkpoint_callback.monitor == "val/accuracy"
    run = Path(cli.trainer.log_dir)
    last = run / "checkpoints" / "last.ckpt"
    assert MAML.load_from_checkpoint(last).loss.label_smoothing == 0.25
    assert main(words("test", **DATA, ckpt_path=last)).model.loss.label_smoothing == 0.25  # the checkpoint's
    again = main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs=2"])
    assert (again.model.loss.label_smoothing, again.trainer.current_epoch) == (0.25, 2)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model.loss": "torch.nn.CrossEntropyLoss", "model.loss.smoothing": 1}, "'smoothing' is not accepted"),
        (
            {"model.loss": "torch.nn.CrossEntropyLoss", "model.loss.weight": [1, 2, 3]},
            "weight is .1, 2, 3.; it takes",
        ),
        (
            {"model.loss.label_smoothing": 0.1},
            "model.loss: Dict must include a class_path .*such as torch.nn.Cross",
        ),
        ({"model.loss": "CrossEntropyLoss"}, "model.loss: Expected a dot import path string: CrossEntropyLoss; give a"),
        ({"model.loss": "pathlib.Path"}, "model.loss pathlib.Path: Expected .* that instantiates into callable"),
    ],
)
def test_a_loss_class_that_cannot_be_used_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(words("fit", **TINY, **flags))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"error: .*{message}", line)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("torch.nn.TripletMarginLoss", "missing a required argument: 'negative'"),
        ("torch.nn.Identity", "too many positional arguments"),
    ],
)
def test_a_loss_class_that_does_not_take_outputs_and_targets_is_named(loss, message, folder: Path):
    with pytest.raises(SettingError, match=f"model.loss {loss} does not take .outputs, targets. alone .{message}"):
        main(words("fit", **TINY, **{"model.loss": loss}))
    assert not (folder / "lightning_logs").exists()


@pytest.mark.parametrize(
    "loss",
    [
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
        {"class_path": "os.system", "init_args": {}},
        {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"weight": "os.system"}},
    ],
)
def test_a_checkpoint_names_no_loss_of_others(loss, trained, tmp_path):
    changed = with_setting(trained, tmp_path, "loss", loss)
    with pytest.raises(SettingError, match=r"names loss.*, so nothing runs"):
        MAML.load_from_checkpoint(changed)
