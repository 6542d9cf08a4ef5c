"""Losses of all that a network returns, as a plain loop calls them; others get the logits."""

import copy
import logging
import warnings
from collections import namedtuple
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call
from torch.utils.data import DataLoader

from maml_lightning import MAML, Episode, SettingError
from maml_lightning.algorithms.inner_loop import InnerLoop
from maml_lightning.algorithms.losses import takes_all
from maml_lightning.structures import tensor_of
from tests.reference import family, reference, relative_error
from tests.structures import CASES, episode_of

T = 13  # so many tasks are vectorized by themselves
Named = namedtuple("Named", ["scores", "code"])
Output = make_dataclass("Output", ["scores", "code"])


class Heads(nn.Module):
    """Scores of three classes and a code, as ``kind`` makes one thing of both."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.scores, self.code, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2), kind

    def forward(self, x):
        h = self.body(x).tanh()
        return self.kind(self.scores(h), self.code(h))


def total(scores, code, targets):
    return F.cross_entropy(scores, targets) + 0.3 * code.square().mean()


KINDS = {
    "tuple": (lambda a, b: (a, b), lambda o, y: total(o[0], o[1], y)),
    "list": (lambda a, b: [a, b], lambda o, y: total(*o, y)),
    "dict": (lambda a, b: {"scores": a, "code": b}, lambda o, y: total(o["scores"], o["code"], y)),
    "logits last": (lambda a, b: {"code": b, "logits": a}, lambda o, y: total(o["logits"], o["code"], y)),
    "named tuple": (Named, lambda o, y: total(o.scores, o.code, y)),
    "dataclass": (Output, lambda o, y: total(o.scores, o.code, y)),
    "object": (lambda a, b: SimpleNamespace(scores=a, code=b), lambda o, y: total(o.scores, o.code, y)),
    "nested": (lambda a, b: (a, {"code": [b, None]}), lambda o, y: total(o[0], o[1]["code"][0], y)),
}
# A loss may take them out of the dict.
KINDS["popped"] = (KINDS["dict"][0], lambda o, y: total(o.pop("scores"), o.pop("code"), y))
# The same by one tensor.
JOINED = (lambda a, b: torch.cat([a, b], 1), lambda o, y: total(o[:, :3], o[:, 3:], y))
LOSS_OF_PAIRS = KINDS["tuple"][1]


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def heads(kind="tuple"):
    torch.manual_seed(0)
    return Heads(JOINED[0] if kind == "joined" else KINDS[kind][0])


def episodes(tasks=T):
    generator = torch.Generator().manual_seed(1)
    x, query = (torch.randn(tasks, n, 4, generator=generator) for n in (6, 9))
    y = torch.arange(3).repeat(tasks, 2)
    return Episode(x, y, query, torch.arange(3).repeat(tasks, 3))


def numbers(result):
    return {"loss": result.loss, **result.gradient}


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("execution", ["traced", "vectorized", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_that_of_a_plain_loop(kind, execution, first_order):
    net, loss, episode = heads(kind), KINDS[kind][1], episodes()
    expected_loss, expected = reference(net, episode, 0.3, 2, loss, first_order)
    for chunk in (None, 5):
        loop = InnerLoop(net, loss, chunk, execution=execution)
        found = loop.meta_gradient(dict(net.named_parameters()), episode, 0.3, 2, first_order)
        assert found.loss.item() == pytest.approx(expected_loss, rel=1e-12)
        assert relative_error(found.gradient, expected) < 1e-12
        assert loop._executor.way(loop._state(T), T) == execution


def test_a_distribution_is_returned_and_its_density_taken():
    net, episode = heads(), episodes()
    net.kind = lambda a, b: Normal(a[:, :2], 1 + a[:, 2:].square() + b.square())

    def loss(outputs, targets):
        return -outputs.log_prob(F.one_hot(targets, 3)[:, :2].double()).mean()

    expected_loss, expected = reference(net, episode, 0.1, 2, loss)
    found = InnerLoop(net, loss).meta_gradient(dict(net.named_parameters()), episode, 0.1, 2)
    assert found.loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert relative_error(found.gradient, expected) < 1e-12
    assert found.predictions.shape == (T, 9, 2)  # its first parameter, the mean


MEMBERS = {
    "multi-step loss": ({"multi_step_epochs": 5}, {"weights": [0, 1 / 2, 1 / 2]}),
    "ANIL": ({"adapted_parameters": ["scores.*", "code.*"]}, {}),
    "BOIL": ({"adapted_parameters": "body"}, {}),
    "Meta-SGD": ({"learn_inner_lr": "weight"}, {}),
    "LSLR": ({"learn_inner_lr": "step"}, {}),
    "first-order Adam": ({"inner_optimizer": "adam", "first_order": True}, {"optimizer": "adam", "first_order": True}),
    "clipping": ({"inner_clip_norm": 0.1}, {"clip": 0.1}),
    "flat memory": ({"flat_memory": True}, {}),
}


@pytest.mark.parametrize("execution", ["auto", "loop"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_setting_takes_such_a_loss(name, kind, execution):
    (settings, meaning), loss = MEMBERS[name], KINDS[kind][1]
    net, untouched, episode = heads(kind), heads(kind), episodes()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, loss=loss, execution=execution, **settings)
    outer = maml.training_step(episode, 0)
    outer.backward()
    meaning = {"weights": [0, 0, 1], "adapted": maml.adaptation.names, "inner_lr": 0.1, **meaning}
    expected_loss, expected = family(maml, untouched, episode, loss, 2, **meaning)
    assert outer.item() == pytest.approx(expected_loss, rel=1e-12)
    assert relative_error({name: value.grad for name, value in maml.named_parameters()}, expected) < 1e-9


@pytest.mark.parametrize("execution", ["traced", "vectorized", "loop"])
@pytest.mark.parametrize("algorithm", ["imaml", "reptile"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_every_algorithm_gives_what_it_gives_of_one_tensor(kind, algorithm, execution):
    found = []
    for name, loss in ((kind, KINDS[kind][1]), ("joined", JOINED[1])):
        net = heads(name)
        loop = InnerLoop(net, loss, execution=execution, proximal=2.0 if algorithm == "imaml" else 0.0)
        found.append(loop.gradient(algorithm, dict(net.named_parameters()), episodes(), 0.3, 3))
    assert relative_error(numbers(found[0]), numbers(found[1])) < 1e-12
    assert torch.allclose(found[0].predictions, found[1].predictions[..., :3], rtol=1e-12)


@pytest.mark.parametrize("query_statistics", ["batch", "support"])
@pytest.mark.parametrize("execution", ["auto", "loop"])
def test_normalized_networks(execution, query_statistics):
    found = []
    for name, loss in (("tuple", LOSS_OF_PAIRS), ("joined", JOINED[1])):
        net = heads(name)
        net.body = nn.Sequential(net.body, nn.BatchNorm1d(6))
        maml = MAML(net, 0.3, 2, loss=loss, execution=execution, query_statistics=query_statistics)
        outer = maml.training_step(episodes(), 0)
        outer.backward()
        gradient = {name: value.grad for name, value in net.named_parameters()}
        found.append({"loss": outer.detach(), **gradient, "after": maml.trajectory(episodes())[-1][..., :3]})
    assert relative_error(*found) < 1e-12


def test_what_cannot_be_separated_from_the_support_set_is_named():
    net = heads()
    net.kind = lambda a, b: (a, b.square().mean())
    maml = MAML(net, 0.3, loss=lambda o, y: F.cross_entropy(o[0], y) + o[1], query_statistics="support")
    with pytest.raises(SettingError, match=r"returns, \(\[15, 3\] float64, \[\] float64\), cannot be separated"):
        maml.training_step(episodes(), 0)


def plain_losses(net, loss, episode, lr, steps):
    """The query losses of each task after each step, and the accuracies of the scores, without the package."""
    losses, right = [], []
    for x, y, query_x, query_y in zip(*episode, strict=True):
        fast = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        of_task, right_of_task = [], []
        for step in range(steps + 1):
            returned = functional_call(net, fast, (query_x,))
            right_of_task.append((tensor_of(returned).argmax(1) == query_y).double().mean())
            of_task.append(loss(returned, query_y).detach())
            if step < steps:
                gradients = torch.autograd.grad(loss(functional_call(net, fast, (x,)), y), [*fast.values()])
                pairs = zip(fast.items(), gradients, strict=True)
                fast = {name: (value - lr * g).detach().requires_grad_() for (name, value), g in pairs}
        losses.append(torch.stack(of_task))
        right.append(torch.stack(right_of_task))
    return torch.stack(losses).mean(0), torch.stack(right).mean(0), fast


@pytest.mark.parametrize("execution", ["auto", "traced", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_loss_is_that_of_a_plain_loop(kind, execution):
    net, loss, episode = heads(kind), KINDS[kind][1], episodes()
    losses, right, _ = plain_losses(net, loss, episode, 0.3, 2)
    maml = MAML(net, 0.3, 2, loss=loss, execution=execution)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true")
    loader = DataLoader([episode], batch_size=None)
    found = trainer.validate(maml, loader, verbose=False)[0]
    assert found["val/loss"] == pytest.approx(losses[-1].item(), rel=1e-12)
    for step in range(3):
        assert found[f"val/accuracy_step_{step}"] == pytest.approx(right[step].item(), rel=1e-6)
    assert trainer.test(maml, loader, verbose=False)[0]["test/loss"] == pytest.approx(losses[-1].item(), rel=1e-12)
    predicted = trainer.predict(maml, loader)[0]
    assert torch.allclose(predicted, maml.trajectory(episode)[-1].softmax(-1), rtol=1e-9)


def test_where_there_is_no_score_the_loss_is_logged_after_each_step(tmp_path):
    net = heads("dict")

    def loss(outputs, targets):
        return F.mse_loss(outputs["scores"], targets["scores"]) + F.mse_loss(outputs["code"], targets["code"])

    x, _, query, _ = episodes()
    support, queries = ({"scores": part[..., :3], "code": part[..., 2:]} for part in (x.sin(), query.sin()))
    episode = Episode(x, support, query, queries)
    maml = MAML(net, 0.3, 2, loss=loss)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true")
    found = trainer.validate(maml, DataLoader([episode], batch_size=None), verbose=False)[0]
    values = []
    for task in range(T):
        one = [{n: v[task] for n, v in part.items()} if isinstance(part, dict) else part[task] for part in episode]
        fast, of_task = dict(net.named_parameters()), []
        for _ in range(3):
            of_task.append(loss(functional_call(net, fast, (one[2],)), one[3]).item())
            gradients = torch.autograd.grad(loss(functional_call(net, fast, (one[0],)), one[1]), [*fast.values()])
            fast = {name: value - 0.3 * g for (name, value), g in zip(fast.items(), gradients, strict=True)}
        values.append(of_task)
    expected = torch.tensor(values).mean(0)
    assert [found[f"val/loss_step_{k}"] for k in range(3)] == pytest.approx(expected.tolist(), rel=1e-6)
    assert found["val/loss"] == pytest.approx(expected[-1].item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_adapt_gives_the_network_of_a_plain_loop(kind):
    net, loss, episode = heads(kind), KINDS[kind][1], episodes(1)
    _, _, fast = plain_losses(net, loss, episode, 0.3, 2)
    maml = MAML(net, 0.3, 2, loss=loss)
    adapted = maml.adapt(episode.support_inputs[0], episode.support_targets[0])
    assert relative_error(dict(adapted.named_parameters()), fast) < 1e-12
    assert type(adapted(episode.query_inputs[0])) is type(net(episode.query_inputs[0]))
    assert torch.equal(maml(episode.query_inputs[0]), tensor_of(net(episode.query_inputs[0])))
    alone = InnerLoop(net, loss).adapt(dict(net.named_parameters()), *(part[0] for part in episode[:2]), 0.3, 2)
    assert relative_error(alone, fast) < 1e-12


def mean_of_tensor(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean() + targets.mean()


def of_tensor(outputs, targets):
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), of_tensor, lambda o, y: -o[:, 0].mean()])
@pytest.mark.parametrize("kind", ["tuple", "list", "logits last"])
def test_a_loss_of_one_tensor_gets_the_logits(kind, loss):
    net, episode = heads(kind), episodes()
    first = heads()
    first.kind = lambda a, b: a
    params = [dict(each.named_parameters()) for each in (net, first)]
    found, expected = (
        InnerLoop(each, loss).meta_gradient(own, episode, 0.3, 2)
        for each, own in zip((net, first), params, strict=True)
    )
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(found.gradient[name], expected.gradient[name]) for name in params[0])


def returned():
    a, b = torch.zeros(5, 3), torch.zeros(5, 2)
    return {"tuple": (a, b), "list": [a, b], "dict": {"logits": a, "code": b}, "dataclass": Output(a, b), "tensor": a}


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.nll_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.multi_margin_loss,
        F.multilabel_soft_margin_loss,
        F.soft_margin_loss,
        F.kl_div,
        F.poisson_nll_loss,
        nn.MSELoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.ops.aten.l1_loss,
    ],
)
def test_no_loss_of_pytorch_takes_several_tensors(loss):
    assert [takes_all(loss, each, torch.arange(5) % 3) for each in returned().values()] == [False] * 5


def test_a_loss_that_is_wrong_of_all_is_no_loss_of_the_logits():
    targets = torch.zeros(5)
    with pytest.raises(SettingError, match=r"from all that model.net returns, .*\(IndexError: tuple .*\), but from"):
        takes_all(lambda o, y: o[2].sum(), returned()["tuple"], targets)  # of logits, of the example 2
    assert takes_all(lambda o, y: o["wrong"].sum(), returned()["dict"], targets)  # so that it is told of it

    def explicit(outputs, targets):
        assert isinstance(outputs, torch.Tensor)
        return outputs.sum()

    assert not takes_all(explicit, returned()["tuple"], targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(mean_of_tensor)
    assert not takes_all(scripted, returned()["tuple"], targets)
    assert not takes_all(lambda o, y: o[y == 0].sum(), returned()["dict"], targets)


def test_of_what_scores_are_is_said_once(caplog):
    said = "Scores and predictions are of the first tensor that the network returns, {scores: [6, 3] float64, code:"
    for kind, times in (("dict", 1), ("tuple", 0), ("logits last", 0), ("joined", 0)):
        caplog.clear()
        maml = MAML(heads(kind), loss=JOINED[1] if kind == "joined" else KINDS[kind][1])
        with caplog.at_level(logging.WARNING, "maml_lightning"):
            for _ in range(2):
                maml.training_step(episodes(), 0)
                maml.eval().trajectory(episodes())
                maml.train()
        assert sum(said in line for line in caplog.messages) == times, kind


def test_the_mode_and_another_loss_are_found_anew():
    class Auxiliary(Heads):  # several tensors in training alone
        def forward(self, x):
            return super().forward(x) if self.training else self.scores(self.body(x).tanh())

    def loss(outputs, targets):
        return total(*outputs, targets) if isinstance(outputs, tuple) else F.cross_entropy(outputs, targets)

    torch.manual_seed(0)
    net, episode = Auxiliary(KINDS["tuple"][0]), episodes()
    maml = MAML(net, 0.3, loss=loss)
    expected, _ = reference(net, episode, 0.3, 1, loss)
    assert maml.training_step(episode, 0).item() == pytest.approx(expected, rel=1e-12)
    maml.eval()
    maml.trajectory(episode)
    maml.train()
    assert maml.training_step(episode, 0).item() == pytest.approx(expected, rel=1e-12)
    maml.loss = F.cross_entropy
    expected, _ = reference(net, episode, 0.3, 1, lambda o, y: F.cross_entropy(o[0], y) + 0 * o[1].sum())
    assert maml.training_step(episode, 0).item() == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_goes_on_with_the_same_loss(tmp_path):
    case = CASES["heads"]
    maml, episode = MAML(case.net(), 0.3, 2, loss=case.loss), episode_of(case)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    loader = DataLoader([episode], batch_size=None)
    Trainer(max_epochs=1, enable_checkpointing=False, **quiet).fit(maml, loader, loader)
    trainer = Trainer(**quiet)
    before = trainer.validate(maml, loader, verbose=False)
    trainer.save_checkpoint(tmp_path / "heads.ckpt")
    loaded = MAML.load_from_checkpoint(tmp_path / "heads.ckpt", net=case.net(), trust=True)
    assert loaded.loss is case.loss
    assert trainer.validate(loaded, loader, verbose=False) == before
    copied = copy.deepcopy(maml)
    assert torch.equal(copied.training_step(episode, 0), maml.train().training_step(episode, 0))


class Growing(Heads):
    """Returns the scores alone where there are few examples, or until its code is wanted."""

    wanted, few = False, 0

    def forward(self, x):
        scores, code = super().forward(x)
        return (scores, code) if self.wanted or (self.few and len(x) > self.few) else scores


def of_any(outputs, targets):
    return F.cross_entropy(outputs, targets) if isinstance(outputs, Tensor) else LOSS_OF_PAIRS(outputs, targets)


@pytest.mark.parametrize("execution", ["auto", "traced", "vectorized", "loop"])
@pytest.mark.parametrize("later", ["a later meta-step", "the queries"])
def test_tensors_that_come_later_are_not_left_out(later, execution):
    net = Growing(KINDS["tuple"][0])
    maml = MAML(net, 0.1, 2, loss=of_any, execution=execution)
    if later == "the queries":
        net.few = 6
    else:
        maml.training_step(episodes(), 0).backward()
        net.wanted = True
    with pytest.raises(SettingError, match=r"returned one tensor at first and now returns \(\[\d+, 3\] float64"):
        maml.training_step(episodes(), 0)


def test_tensors_that_come_later_are_left_out_by_a_loss_of_logits():
    net = Growing(KINDS["tuple"][0])
    maml, found = MAML(net, 0.1, 2), []
    for net.wanted in (False, True):
        found.append(maml.training_step(episodes(), 0).item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_what_holds_no_tensor_for_the_scores_is_named():
    net = heads()
    net.kind = lambda a, b: iter([a, b])
    maml = MAML(net, 0.1, loss=lambda o, y: F.cross_entropy(next(o), y) + next(o).square().mean())
    with pytest.raises(SettingError, match="with no tensor to take as its outputs"):
        maml.training_step(episodes(), 0)


def mistaken(outputs, targets):
    if isinstance(outputs, tuple):
        return LOSS_OF_PAIRS(outputs, targets, weight=0.4)  # which it does not take
    return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss", [mistaken, lambda outputs, targets: F.cross_entropy(outputs, targets)])
def test_a_loss_of_ones_own_that_gets_the_logits_alone_says_why_once(loss, caplog):
    maml = MAML(Growing(KINDS["tuple"][0]), 0.1, 2, loss=loss)
    maml.net.wanted = True
    for _ in range(2):
        maml.training_step(episodes(), 0).backward()
    assert caplog.text.count("model.loss gets the logits alone: of all that model.net returns, ([") == 1
    assert "it raises TypeError: " in caplog.text


def test_a_loss_of_torch_gets_the_logits_without_a_word(caplog):
    maml = MAML(Growing(KINDS["tuple"][0]), 0.1, 2, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    maml.net.wanted = True
    maml.training_step(episodes(), 0).backward()
    assert "model.loss" not in caplog.text
