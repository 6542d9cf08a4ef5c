"""What calls change happens as in a loop, what networks read may change, and trials leave nothing behind."""

import copy
import itertools
import random
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, Episode, SettingError
from maml_lightning.engine.fingerprints import fingerprint
from maml_lightning.engine.trials import Trial
from tests.reference import reference, relative_error

SCALE = 1.0


class Settings:
    scale = 1.0


class Net(nn.Module):
    """A linear layer whose outputs are multiplied by ``scale(net, outputs)``."""

    def __init__(self, scale):
        super().__init__()
        self.layer, self.scale, self.calls, self.kept = nn.Linear(4, 3), scale, 0, SimpleNamespace(calls=0, value=1.0)
        self.history, self.numbers, self.schedule = deque(maxlen=3), random.Random(0), itertools.count(1)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        outputs = self.layer(x)
        return outputs * self.scale(self, outputs)

    @property
    def of_settings(self):
        return Settings.scale


def counted(net, outputs):
    net.calls += 1
    return 1 + 0.1 * net.calls


def counted_in_a_part(net, outputs):
    net.kept.calls += 1
    return 1 + 0.1 * net.kept.calls


def remembered(net, outputs):
    net.history.append(outputs.detach().mean())
    return 1 + sum(net.history)


def averaged(net, outputs):
    net.mean = 0.9 * net.mean + 0.1 * outputs.detach().mean(0)
    return 1 + net.mean


def averaged_in_place(net, outputs):
    net.mean.data.mul_(0.9).add_(0.1 * outputs.detach().mean(0))
    return 1 + net.mean.clone()


EFFECTS = {
    "attribute": counted,
    "attribute of a part": counted_in_a_part,
    "deque": remembered,
    "buffer": averaged,
    "buffer's data": averaged_in_place,
    "generator of its own": lambda net, outputs: net.numbers.random(),
    "iterator": lambda net, outputs: next(net.schedule),
}
READ = {
    "global variable": lambda net, outputs: SCALE,
    "class attribute": lambda net, outputs: Settings.scale,
    "property": lambda net, outputs: net.of_settings,
    "attribute of a part": lambda net, outputs: net.kept.value,
}


def episode():
    generator = torch.Generator().manual_seed(3)
    x, query = (torch.rand(3, 6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    y = torch.arange(3).repeat(3, 2)
    return Episode(x, y, query, y)


def gradient(maml):
    maml.zero_grad()
    maml.training_step(episode(), 0).backward()
    return {name: value.grad for name, value in maml.net.named_parameters()}


@pytest.mark.parametrize("flat_memory", [False, True])  # which recomputes nothing in a loop: effects would be repeated
@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_are_those_of_a_loop(effect, flat_memory):
    net = Net(EFFECTS[effect]).double()
    plain = copy.deepcopy(net)
    maml = MAML(net, inner_lr=0.1, inner_steps=2, flat_memory=flat_memory)
    for _ in range(2):
        _, expected = reference(plain, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9


@pytest.mark.parametrize("read", READ)
def test_what_is_read_may_change(read, monkeypatch):
    net = Net(READ[read]).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    for scale in (1.0, 3.0):
        monkeypatch.setattr(f"{__name__}.SCALE", scale)
        monkeypatch.setattr(Settings, "scale", scale)
        net.kept.value = scale
        _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9


def test_a_network_that_clips_its_weights_keeps_those_of_its_own():
    def clipped(net, outputs):
        net.layer.weight.data.clamp_(-0.1, 0.1)
        return 1.0

    net = Net(clipped).double()
    before = net.layer.weight.detach().clone()
    gradient(MAML(net, inner_lr=0.1, inner_steps=1))
    assert torch.equal(net.layer.weight, before)


LATE = {"attribute": counted, "buffer": averaged, "Python's random numbers": lambda net, outputs: random.random()}


@pytest.mark.parametrize("begins", ["at a step", "with longer inputs"])
@pytest.mark.parametrize("effect", LATE)
def test_effects_that_begin_late_are_those_of_a_loop(effect, begins):
    def late(net, outputs):
        begun = net.kept.value > 9 if begins == "at a step" else len(outputs) > 20
        return LATE[effect](net, outputs) if begun else 1 + 0 * net.kept.value

    net = Net(late).double()
    plain = copy.deepcopy(net)
    maml = MAML(net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=1)
    for step in range(12) if begins == "at a step" else range(4):
        each = episode()
        if begins == "at a step":  # more states than are traced
            net.kept.value = plain.kept.value = step
        else:
            each = Episode(*(part.repeat(1, 1 + step, *[1] * (part.dim() - 2)) for part in each))
        state = random.getstate()
        _, expected = reference(plain, each, 0.1, 2, F.cross_entropy)
        random.setstate(state)
        maml.zero_grad()
        maml.training_step(each, 0).backward()
        assert relative_error({name: value.grad for name, value in net.named_parameters()}, expected) < 1e-9
    assert net.calls == plain.calls


def test_what_a_network_keeps_is_no_tensor_of_a_transform_however_often_its_attributes_change():
    def kept(net, outputs):
        net.last = outputs if net.kept.value > 9 else None
        return 1.0

    net = Net(kept).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=1)
    for step in range(11):
        net.kept.value = step
        gradient(maml)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(net.last)


@contextmanager
def _doubled(by: list[float]):
    yield by[0]


class Decorated(nn.Linear):
    """A layer whose method a context manager decorates, which is then in its closure with a generator."""

    @_doubled([2.0])
    def forward(self, x):
        return super().forward(x)


def test_a_context_manager_that_decorates_a_function_is_copied_and_is_what_it_was_made_of():
    net = Decorated(3, 2)
    assert fingerprint((net,)) == fingerprint((net,))
    x = torch.rand(4, 3)
    outputs, changes = Trial((net,)).watch(lambda objects: objects[0](x))
    assert not changes
    assert torch.equal(outputs, net(x))


def test_a_context_manager_in_use_has_no_copy():
    net = nn.Linear(3, 2)
    net.manager = _doubled([2.0])
    with net.manager, pytest.raises(TypeError, match="generator"):
        Trial((net,))


def test_what_a_context_manager_is_made_with_counts():
    net = nn.Linear(3, 2)
    net.manager = _doubled([2.0])
    before = fingerprint((net,))
    net.manager.args[0][0] = 3.0
    assert fingerprint((net,)) != before


class Graph(nn.Module):
    """A layer between products with a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("adjacency", (torch.eye(3) + 0.1).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, self.layer(x).T).T.tanh()


def test_a_sparse_buffer_runs_as_in_a_loop():
    torch.manual_seed(0)
    net = Graph().double()
    _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
    assert relative_error(gradient(MAML(net, inner_lr=0.1, inner_steps=2)), expected) < 1e-9


class Shared:
    """Is the same in each copy of what holds it."""

    def __init__(self, layer):
        self.layer = layer

    def __deepcopy__(self, memo):
        return self


class Owner(nn.Module):
    """Calls its second layer in a way that copies do not follow."""

    def __init__(self, call, kept):
        super().__init__()
        self.first, self.second, self.call = nn.Linear(4, 4), nn.Linear(4, 3), call
        self.kept = kept(self)

    def forward(self, x):
        return self.call(self, torch.tanh(self.first(x)))


class Forgetful(Owner):
    """Does not keep all that it has where it is copied or saved."""

    def __getstate__(self):
        return {**vars(self), "kept": None}


NOT_COPIED = {
    "weak reference": lambda: Owner(lambda net, h: net.kept()(h), lambda net: weakref.ref(net.second)),
    "weak dictionary": lambda: Owner(
        lambda net, h: net.kept["own"](h), lambda net: weakref.WeakValueDictionary(own=net.second)
    ),
    "shared": lambda: Owner(lambda net, h: net.kept.layer(h), lambda net: Shared(net.second)),
    "not in its state": lambda: Forgetful(lambda net, h: net.second(h) * net.kept[0], lambda net: [2.0]),
    "gradient": lambda: Owner(
        lambda net, h: net.second(torch.vmap(net.kept)(h)),
        lambda net: torch.func.grad(lambda h: torch.tanh(net.first(h)).square().sum()),
    ),
}


@pytest.mark.parametrize("flat_memory", [False, True])
@pytest.mark.parametrize("kind", NOT_COPIED)
def test_what_copies_do_not_copy_is_as_in_a_loop(kind, flat_memory, caplog):
    torch.manual_seed(0)
    net = NOT_COPIED[kind]().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2, flat_memory=flat_memory)
    for _ in range(2):
        _, expected = reference(net, episode(), 0.1, 2, F.cross_entropy)
        assert relative_error(gradient(maml), expected) < 1e-9
    assert ("cannot be copied" in caplog.text) == ("dictionary" in kind)


CALLED = {
    "function": lambda: Owner(lambda net, h: net.kept(h), lambda net: lambda h: net.second(h)),
    "vectorized": lambda: Owner(lambda net, h: net.kept(h), lambda net: torch.vmap(lambda h: net.second(h))),
    "parent": lambda: Owner(
        lambda net, h: net.first.owner().second(h), lambda net: setattr(net.first, "owner", weakref.ref(net))
    ),
}


@pytest.mark.parametrize("kind", [*NOT_COPIED, *CALLED])
def test_an_adapted_network_calls_its_own_layers(kind):
    torch.manual_seed(0)
    net, each = {**NOT_COPIED, **CALLED}[kind]().double(), episode()
    maml = MAML(net, inner_lr=0.5, inner_steps=3)
    if kind == "weak dictionary":
        with pytest.raises(
            SettingError, match=r"^model.net cannot be copied \(a part of it refers to its layers, .*;?$"
        ):
            maml.adapt(each.support_inputs[0], each.support_targets[0])
        return
    adapted = maml.adapt(each.support_inputs[0], each.support_targets[0])
    expected = maml.trajectory(each)
    with torch.no_grad():
        outputs = adapted(each.query_inputs[0])
    assert torch.allclose(outputs, expected[-1][0], rtol=1e-9)
    assert not torch.allclose(outputs, expected[0][0], rtol=1e-3)


def test_an_adapted_network_shares_what_its_hooks_note():
    noted = []
    net = nn.Linear(4, 3)
    net.register_forward_hook(lambda layer, args, output: noted.append(len(output)))
    adapted = MAML(net, inner_lr=0.1).adapt(torch.rand(6, 4), torch.arange(3).repeat(2))
    noted.clear()
    adapted(torch.rand(5, 4))
    assert noted == [5]


class Clipped(nn.Module):
    """Clips the gradient of its hidden values."""

    def __init__(self, node):
        super().__init__()
        self.first, self.second, self.node = nn.Linear(4, 8), nn.Linear(8, 3), node

    def forward(self, x):
        h = self.first(x)
        if h.requires_grad and self.node:
            h.grad_fn.register_prehook(lambda gradients: (gradients[0].clamp(-0.02, 0.02),))
        elif h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
        return self.second(torch.tanh(h))


@pytest.mark.parametrize("node", [False, True])
def test_hooks_of_gradients_that_seldom_do_something_run_as_in_a_loop(node):
    torch.manual_seed(0)
    net = Clipped(node).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=3)
    for scale in (0.1, 10.0, 30.0):
        each = episode()
        each = each._replace(support_inputs=scale * each.support_inputs, query_inputs=scale * each.query_inputs)
        _, expected = reference(net, each, 0.1, 3, F.cross_entropy)
        maml.zero_grad()
        maml.training_step(each, 0).backward()
        assert relative_error({name: value.grad for name, value in net.named_parameters()}, expected) < 1e-9
