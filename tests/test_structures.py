"""Inputs, outputs and targets of any structure: exact, trained and evaluated."""

import json
import logging
from collections import OrderedDict, namedtuple
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from cli import main
from maml_lightning import (
    MAML,
    AdaptationMonitor,
    CostMonitor,
    Episode,
    LastCheckpoint,
    PredictionReport,
    SettingError,
    TestReport,
)
from maml_lightning.structures import describe, logits_of
from tests.reference import perturbed, relative_error
from tests.runs import TINY, words
from tests.structures import CASES, Q, T, episode_of


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def task(part, index):
    """One task's part, without the package."""
    if isinstance(part, dict):
        return {name: task(value, index) for name, value in part.items()}
    return type(part)(task(value, index) for value in part) if isinstance(part, tuple | list) else part[index]


def outputs_of(net, params, x, takes_all=False):
    args, named = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, tuple | list) else (x,), {})
    found = functional_call(net, params, args, named)
    if takes_all:
        return found
    if isinstance(found, dict):
        return found["logits" if "logits" in found else "classes"]
    return found[0] if isinstance(found, tuple) else getattr(found, "logits", found)


def plain_loop(net, case, episode, tasks, lr, steps):
    def loss(params, x, y):
        return case.loss(outputs_of(net, params, x, case.takes_all), y)

    start = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    total = 0.0
    for index in range(tasks):
        x, y, query_x, query_y = (task(part, index) for part in episode)
        fast = start
        for _ in range(steps):
            grads = torch.autograd.grad(loss(fast, x, y), [*fast.values()], create_graph=True)
            fast = {name: value - lr * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
        total = total + loss(fast, query_x, query_y) / tasks
    total.backward()
    return total.item(), {name: value.grad for name, value in start.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_meta_gradient_is_that_of_a_plain_loop(name, doubles):
    case = CASES[name]
    net, episode = perturbed(case.net()), episode_of(case)
    expected_loss, expected = plain_loop(net, case, episode, T, 0.1, 2)
    for chunk in (2, None):
        maml = MAML(net, inner_lr=0.1, inner_steps=2, loss=case.loss, tasks_per_chunk=chunk)
        net.zero_grad()
        loss = maml.training_step(episode, 0)
        loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
        assert relative_error({n: value.grad for n, value in net.named_parameters()}, expected) < 1e-9
        assert [maml.scoring.score and maml.scoring.score.name] == [case.score]


@pytest.mark.parametrize("algorithm", ["imaml", "reptile"])
@pytest.mark.parametrize("name", ["dict", "list", "dict targets", "heads", "heads of tasks"])
def test_every_algorithm_takes_structures(name, algorithm):
    case = CASES[name]
    maml = MAML(case.net(), inner_lr=0.1, loss=case.loss, algorithm=algorithm, tasks_per_chunk=2)
    maml.training_step(episode_of(case), 0).backward()
    assert all(value.grad.abs().sum() > 0 for value in maml.net.parameters())


@pytest.mark.parametrize("name", ["dict", "tuple", "dataclass output", "pixels", "dict targets", "heads"])
def test_adapt_gives_the_network_of_the_trajectory(name):
    case = CASES[name]
    maml, episode = MAML(case.net(), inner_lr=0.1, inner_steps=2, loss=case.loss), episode_of(case)
    before, _, after = maml.trajectory(episode)
    moved = maml.inner_update_norms(episode)
    for index in range(T):
        x, y, query_x, _ = (task(part, index) for part in episode)
        adapted = maml.adapt(x, y)
        found = outputs_of(adapted, dict(adapted.named_parameters()), query_x)
        assert torch.allclose(found, after[index], atol=1e-6)
        assert torch.allclose(maml(query_x), before[index], atol=1e-6)
        pairs = zip(adapted.parameters(), maml.net.parameters(), strict=True)
        norm = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
        assert torch.allclose(norm, moved[index], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # pytest resets the package's own filter
@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_under_a_trainer(name, tmp_path, caplog):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    case = CASES[name]
    maml = MAML(case.net(), inner_lr=0.1, loss=case.loss, outer_lr=0.01)
    before = {n: value.clone() for n, value in maml.net.state_dict().items()}
    episode = episode_of(case)
    loader = DataLoader([episode] * 2, batch_size=None)
    last = DataLoader([episode], batch_size=None)
    callbacks = [AdaptationMonitor(), CostMonitor(), LastCheckpoint(), TestReport(), PredictionReport()]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path, callbacks=callbacks
    )
    trainer.fit(maml, loader, last)
    logged = dict(trainer.callback_metrics)
    score = case.score or "loss"
    assert {"train/loss", "val/loss", f"val/{score}", f"val/{score}_step_0", f"val/{score}_step_1"} <= set(logged)
    assert ("train/accuracy" in logged) == (case.score == "accuracy")
    assert ("train/mse" in logged) == (case.score == "mse")
    assert any(not torch.equal(value, before[n]) for n, value in maml.net.state_dict().items())
    shown = EventAccumulator(trainer.log_dir, size_guidance={"images": 0}).Reload().Tags()["images"]
    pictures = {"inspect/episodes"} if name in ("pictures", "one number") else set()
    assert set(shown) == {"inspect/adaptation", *pictures}
    (tested,) = trainer.test(maml, last, verbose=False)
    losses = []
    for index in range(T):
        x, y, query_x, query_y = (task(part, index) for part in episode)
        adapted = maml.adapt(x, y)
        losses.append(case.loss(outputs_of(adapted, {}, query_x, case.takes_all), query_y).item())
    assert tested["test/loss"] == pytest.approx(sum(losses) / T, rel=1e-5)
    (predicted,) = trainer.predict(maml, last)
    assert predicted.shape[:2] == (T, Q)
    results = json.loads((Path(trainer.log_dir) / "test_results.json").read_text())
    assert results[score] == pytest.approx(tested[f"test/{score}"], abs=1e-6)
    assert (Path(trainer.log_dir) / "predictions.csv").exists() == (
        name not in ("pixels", "some pixels", "dict targets", "heads of tasks")
    )
    assert "inspection shows nothing" not in caplog.text


@pytest.mark.usefixtures("folder")
def test_dict_inputs_on_the_command_line():
    flags = {
        "data": "tests.own_data.CaseData",
        **dict.fromkeys(("data.train_episodes", "data.val_episodes", "data.test_episodes", "data.meta_batch_size"), 4),
        "data.shots": 6,
        "data.query_shots": 6,
        "model.net": "tests.structures.Words",
        **{key: value for key, value in TINY.items() if key.startswith("trainer.")},
    }
    cli = main(words("fit", **flags))
    (best,) = Path(cli.trainer.log_dir).glob("checkpoints/best.ckpt")
    given = {**flags, "ckpt_path": best, "trainer.max_epochs": None}
    assert 0 <= main(words("test", **given)).trainer.callback_metrics["test/accuracy"] <= 1
    (predicted,) = main(words("predict", **given)).trainer.predict_loop.predictions
    assert predicted.shape == (4, 6, 3)
    assert torch.allclose(predicted.sum(-1), torch.ones(4, 6))
    loss = "torch.nn.functional.binary_cross_entropy_with_logits"
    net = {"model.net": "torch.nn.Linear", "model.net.in_features": 4, "model.net.out_features": 3}
    with pytest.raises(SettingError, match=r"checkpoint.monitor is val/accuracy, which is not logged .* val/loss"):
        main(words("fit", **{**flags, **net, "data.name": "labels", "model.loss": loss}))


def test_mappings_are_taken_as_dicts():
    case = CASES["dict"]
    episode, maml = episode_of(case), MAML(case.net(), inner_lr=0.1)
    ordered = episode._replace(support_inputs=OrderedDict(episode.support_inputs))
    assert torch.equal(maml.training_step(ordered, 0), maml.training_step(episode, 0))
    x, y = task(episode.support_inputs, 0), episode.support_targets[0]
    assert torch.equal(maml.adapt(OrderedDict(x), y).head.weight, maml.adapt(x, y).head.weight)
    assert type(Episode(*ordered).check().support_inputs) is dict


def test_logits_are_found():
    x = torch.rand(2, 3)
    holder = make_dataclass("Holder", ["logits", "loss"])
    named = namedtuple("Named", ["aux", "logits"])
    only = make_dataclass("Only", ["last", "cache"])
    for outputs in (x, (x, 1), [x], {"aux": 0 * x, "logits": x}, holder(x, None), named(0 * x, x), {"out": x}):
        assert logits_of(outputs) is x
    assert logits_of(only(x, None)) is x
    for outputs in ({"a": x, "b": x}, {}, (), None, (1, x), {"logits": [x]}, only(x, x), "text"):
        with pytest.raises(SettingError, match=r"^model.net returns \w+.* no tensor to take as its outputs; return"):
            logits_of(outputs)


class Silent(nn.Linear):
    def forward(self, x: Tensor) -> dict:  # type: ignore[override]
        return {"mean": super().forward(x), "variance": x}


def test_a_network_without_outputs_is_refused_in_one_line():
    maml, episode = MAML(Silent(4, 3)), episode_of(CASES["many outputs"])
    with pytest.raises(SettingError, match=r"model.net returns dict of mean, variance, with no tensor") as error:
        maml.training_step(episode, 0)
    assert "\n" not in str(error.value)


def test_parts_that_are_no_tensors_are_refused():
    episode = episode_of(CASES["dict"])
    with pytest.raises(SettingError, match=r"support_inputs must be a tensor, .* it holds str. Make tensors of it"):
        Episode({"input_ids": "text"}, *episode[1:]).check()
    with pytest.raises(SettingError, match=r"query_inputs must be .* it holds NoneType"):
        episode._replace(query_inputs={**episode.query_inputs, "token_type_ids": None}).check()
    with pytest.raises(SettingError, match=r"query_inputs must be .* it holds nothing"):
        episode._replace(query_inputs={}).check()
    short = {name: value[:2] for name, value in episode.query_inputs.items()}
    with pytest.raises(SettingError, match=r"share the task dimension T; got .*\{input_ids: \[2, 5, 7\] int64, "):
        episode._replace(query_inputs=short).check()
    with pytest.raises(SettingError, match="share the task dimension"):
        episode._replace(query_targets=torch.tensor(1.0)).check()


@pytest.mark.parametrize(
    "made",
    [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn, lambda x: torch.nested.nested_tensor([x[0], x[1, :2]])],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_that_are_not_dense_are_refused_in_one_line(made):
    x, y = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(SettingError, match=r"^An Episode's query_inputs must be dense tensors; .*\.to_dense.*$"):
        MAML(nn.Linear(4, 2)).training_step(Episode(x, y, made(x), y), 0)


@pytest.mark.parametrize("part", [lambda x: x[:0], lambda x: x[:, :0]])
def test_batches_without_queries_are_refused_in_one_line(part):
    x, y = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    episode = Episode(*((x, y) if len(part(x)) else (part(x), part(y))), part(x), part(y))
    with pytest.raises(SettingError, match=r"^An Episode needs at least one task, and a query .* Leave empty batches"):
        MAML(nn.Linear(4, 2)).training_step(episode, 0)


def test_a_network_that_takes_other_names_is_refused_in_one_line():
    episode = episode_of(CASES["dict"])
    renamed = episode._replace(support_inputs={"tokens": episode.support_inputs["input_ids"]})
    with pytest.raises(
        SettingError, match=r"inputs, \{tokens: \[4, 7\] int64\} \(.*unexpected keyword.*forward, input_ids, "
    ) as error:
        MAML(CASES["dict"].net()).training_step(renamed, 0)
    assert "\n" not in str(error.value)


def test_structures_are_described():
    described = describe({"a": torch.rand(2, 3), "b": (torch.zeros(1, dtype=torch.int64), [True])})
    assert described == "{a: [2, 3], b: ([1] int64, (bool))}"
    assert describe(torch.zeros(2, dtype=torch.float64)) == "[2] float64"
