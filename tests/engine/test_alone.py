"""A task by itself: operators without a second derivative are replaced however a network calls them, without a mode."""

import inspect
import operator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import embedding_bag as renamed_bag
from torch.nn.functional import hardsigmoid as renamed
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from maml_lightning import Episode, InnerLoop
from maml_lightning.engine.differentiation import by_autograd
from maml_lightning.engine.kernels.alone import _PLACES, twice_differentiable
from maml_lightning.engine.loop import vjp
from tests.engine.test_activations import BAGS, bag_of
from tests.reference import reference, relative_error

OWN = [getattr(owner, name) for owner, name, _ in _PLACES]


def helper(x):
    return renamed(x)


class Calls(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.layer, self.act = nn.Linear(2, 2), act

    def forward(self, x):
        return self.act(self.layer(x))


class Held:
    def __init__(self):
        self.act = F.hardsigmoid


class InTable(Calls):
    acts = {"own": F.hardsigmoid}  # noqa: RUF012

    def forward(self, x):
        return self.acts["own"](self.layer(x))


class OfClass(Calls):
    kind = nn.Hardsigmoid

    def forward(self, x):
        return self.kind()(self.layer(x))


class Late(Calls):
    """Like layers of torch_geometric: what it calls is found by name; and another branch from some call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        found = inspect.signature(self.act).parameters["name"].default
        return getattr(F, found if self.calls > 2 else "relu6")(self.layer(x) + 3 * (self.calls < 3)) / (
            1 if self.calls > 2 else 6
        )


HARD = "hard"


def hooked():
    net = Calls(lambda x: x)
    net.register_forward_hook(lambda layer, args, output: F.hardsigmoid(output))
    return net


CALLS = {
    "function": lambda: Calls(F.hardsigmoid),
    "in place": lambda: Calls(lambda x: F.hardsigmoid(x * 1, inplace=True)),
    "function of a function": lambda: Calls(lambda x: helper(x)),
    "attrgetter": lambda: Calls(lambda x: operator.attrgetter(HARD + "sigmoid")(F)(x)),
    "variables": lambda: Calls(lambda x: vars(F)[HARD + "sigmoid"](x)),
    "dictionary of a module": lambda: Calls(lambda x: F.__dict__[HARD + "sigmoid"](x)),
    "imported by name": lambda: Calls(lambda x: __import__("operator").methodcaller(HARD + "sigmoid", x)(F)),
    "partial": lambda: Calls(partial(F.hardsigmoid, inplace=False)),
    "bound method": lambda: Calls(nn.Hardsigmoid().forward),
    "layer": lambda: Calls(nn.Hardsigmoid()),
    "layer made in the call": lambda: Calls(lambda x: nn.Hardsigmoid()(x)),
    "object": lambda: Calls(Held().act),
    "hook": hooked,
    "name made by code": lambda: Calls(lambda x: getattr(F, HARD + "sigmoid")(x)),
    "table of a class": lambda: InTable(None),
    "class of a class": lambda: OfClass(None),
    "operator of torch": lambda: Calls(lambda x: torch._C._nn.hardsigmoid(x)),
    "checkpoint": lambda: Calls(lambda x: checkpoint(F.hardsigmoid, x, use_reentrant=False)),
    "branch taken later": lambda: Late(lambda name=HARD + "sigmoid": name),
}


def batch():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 4, 2, dtype=torch.float64), torch.randn(2, 2, 4, 2, dtype=torch.float64)
    return Episode(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("execution", ["loop", "auto"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_network_is_exact_however_it_calls_a_replaced_operator(kind, execution):
    net, episode = CALLS[kind]().double(), batch()
    manual = Calls(lambda x: F.relu6(x + 3) / 6).double()
    manual.load_state_dict(net.state_dict())
    _, expected = reference(manual, episode, 0.5, 2, F.mse_loss)
    loop = InnerLoop(net, F.mse_loss, execution=execution)
    for _ in range(2):
        found = loop.meta_gradient(dict(net.named_parameters()), episode, 0.5, 2).gradient
        assert relative_error(found, expected) < 1e-9


def test_so_is_a_loss_that_calls_one():
    net, episode = Calls(lambda x: x).double(), batch()
    _, expected = reference(net, episode, 0.5, 2, lambda p, y: F.mse_loss(F.relu6(p + 3) / 6, y))
    loop = InnerLoop(net, lambda p, y: F.mse_loss(F.hardsigmoid(p), y), execution="loop")
    assert relative_error(loop.meta_gradient(dict(net.named_parameters()), episode, 0.5, 2).gradient, expected) < 1e-9


def test_what_is_checkpointed_runs_anew_with_the_same_operators():
    x = torch.randn(2, 3, dtype=torch.float64)
    act = partial(checkpoint, F.hardsigmoid, use_reentrant=False)
    outputs, pullback = vjp(lambda x: act(x), (0,), x, ())
    gradient = pullback(torch.ones_like(outputs))
    assert torch.equal(gradient, (x.abs() < 3).double() / 6)


def test_networks_run_without_a_mode():  # it would take time at each call of any operator
    modes = []

    def act(x, name="tanh"):
        modes.extend(_get_current_function_mode_stack())
        return getattr(F, inspect.signature(act).parameters["name"].default)(x)

    net, episode = Calls(act).double(), batch()
    loop = InnerLoop(net, F.mse_loss, execution="loop")
    for _ in range(2):
        loop.meta_gradient(dict(net.named_parameters()), episode, 0.5, 2)
    assert modes == []


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings_are_torchs(name):
    torch.manual_seed(0)
    index, settings = bag_of(name)
    weight = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).requires_grad_()
    expected = renamed_bag(index, weight * 1, **settings)
    with twice_differentiable():
        found = renamed_bag(index, weight * 1, **settings)
    assert torch.allclose(found, expected, rtol=1e-9)
    slopes = [torch.autograd.grad(y.sin().sum(), weight, create_graph=True)[0] for y in (found, expected)]
    assert torch.allclose(*slopes, rtol=1e-9)
    if name != "offsets, max":  # torch's own
        torch.autograd.grad(slopes[0].square().sum(), weight)


@pytest.mark.parametrize("offsets", [[0, 2], [0, 1], [0, 0, 4], [0, 4], [0, 5]])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_so_are_bags_of_any_sizes(offsets, mode):
    index, weight = torch.tensor([0, 1, 2, 2, 0]), torch.rand(3, 2, dtype=torch.float64)
    arguments = index, weight, torch.tensor(offsets, dtype=torch.long)
    with twice_differentiable():
        found = F.embedding_bag(*arguments, mode=mode)
    assert torch.allclose(found, F.embedding_bag(*arguments, mode=mode), rtol=1e-9)


def test_gradients_scaled_by_frequency_are_torchs_own():
    index, weight = torch.tensor([[0, 1, 1]]), torch.rand(3, 2, requires_grad=True)
    with twice_differentiable():
        (found,) = torch.autograd.grad(F.embedding_bag(index, weight, scale_grad_by_freq=True).sum(), weight)
    (plain,) = torch.autograd.grad(F.embedding_bag(index, weight).sum(), weight)
    assert torch.allclose(found, plain / torch.tensor([[1.0], [2.0], [1.0]]))


def test_running_statistics_are_not_rounded():  # as by older versions of PyTorch
    torch.manual_seed(0)
    layer, x = nn.InstanceNorm1d(256, track_running_stats=True).eval(), torch.randn(7, 256, 3)
    layer.running_mean.normal_()
    before = layer.running_mean.clone()
    with by_autograd():
        found = layer(x)
    assert torch.equal(layer.running_mean, before)
    assert torch.allclose(found, layer(x), atol=1e-5)
    with by_autograd():
        found = F.instance_norm(x)
    assert torch.equal(found, F.instance_norm(x))


def test_torch_has_its_own_operators_afterwards():
    def now():
        return [getattr(owner, name) for owner, name, _ in _PLACES]

    def within():
        with twice_differentiable():
            with twice_differentiable():
                assert now() == [kernel for *_, kernel in _PLACES]
            assert now() == [kernel for *_, kernel in _PLACES]
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        within()
    assert now() == OWN
