"""What a meta-step leaves behind: inputs that the network writes to, random numbers, calls that are counted."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from maml_lightning import MAML, SettingError
from tests.zoo.case import VECTOR, Case
from tests.zoo.loop import meta_gradient, relative_error
from tests.zoo.python_state import Perceptron
from tests.zoo.sequences import Checkpointed, directly


class Writes(Perceptron):
    """Changes its inputs in place."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        self.write(x)
        return super().forward(x)


def first_column(x):
    x[:, 0] = 0.5


def by_numpy(x):
    x.detach().numpy()[...] *= 2


WRITES = {
    "ReLU(inplace=True)": nn.ReLU(inplace=True),
    "multiplied": lambda x: x.mul_(2),
    "a column": first_column,
    "centered": lambda x: x.sub_(x.mean(0)),
    "data": lambda x: x.data.mul_(2),
    "NumPy": by_numpy,
}
CASE = Case("writes", Perceptron, VECTOR)


def step(net, steps=1, loss=F.cross_entropy, **settings):
    """The gradient of a training step, and the episode after it."""
    episode = CASE.episode()
    maml = MAML(net, inner_lr=0.1, inner_steps=steps, loss=loss, **settings)
    maml.training_step(episode, 0).backward()
    return {name: value.grad for name, value in net.named_parameters()}, episode


def check_like_loop(make, steps=1, loss=F.cross_entropy, **settings):
    found, episode = step(make(), steps, loss=loss, **settings)
    of_loop = CASE.episode()
    expected = meta_gradient(make(), of_loop, 0.1, steps, loss, outputs_before=False)
    assert relative_error(found, expected.gradient) < 1e-9
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(episode, of_loop, strict=True))


def writing(kind):
    torch.manual_seed(0)
    return Writes(WRITES[kind]).double()


@pytest.mark.parametrize("settings", [{}, {"execution": "loop"}], ids=str)
@pytest.mark.parametrize("kind", WRITES)
def test_inputs_that_the_network_writes_to_change_as_in_the_plain_loop(kind, settings):
    check_like_loop(lambda: writing(kind), **settings)


@pytest.mark.parametrize("settings", [{}, {"first_order": True}, {"flat_memory": True}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_anew_in_the_backward_pass_have_the_parameters_of_their_call(reentrant, settings):
    def made(run):
        torch.manual_seed(0)
        return Checkpointed(run).double()

    found, episode = step(made(partial(checkpoint, use_reentrant=reentrant)), steps=2, **settings)
    first_order = settings.get("first_order", False)
    expected = meta_gradient(made(directly), episode, 0.1, 2, F.cross_entropy, first_order)
    assert relative_error(found, expected.gradient) < 1e-9


class Anew(torch.autograd.Function):
    """Runs a layer anew in the backward pass, as reversible networks and the adjoint method do."""

    @staticmethod
    def forward(ctx, layer, x, *parameters):
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            outputs = ctx.layer(x)
        return None, None, *torch.autograd.grad(outputs, parameters, gradient)


@pytest.mark.parametrize("execution", ["auto", "loop"])
def test_so_have_layers_that_a_function_of_ones_own_runs_anew(execution):
    def made(run):
        torch.manual_seed(0)
        return Checkpointed(run).double()

    def anew(layer, x):
        return layer(x) if x.requires_grad else Anew.apply(layer, x, *layer.parameters())

    found, episode = step(made(anew), steps=2, first_order=True, execution=execution)
    expected = meta_gradient(made(directly), episode, 0.1, 2, F.cross_entropy, first_order=True)
    assert relative_error(found, expected.gradient) < 1e-9


def test_the_search_for_the_head_writes_to_no_inputs():
    _, episode = step(writing("multiplied"), adapted_parameters="head")
    assert torch.equal(episode.support_inputs, 2 * CASE.episode().support_inputs)


@pytest.mark.parametrize("execution", ["auto", "loop"])
def test_a_gradient_that_needs_what_is_written_over_is_refused_in_one_line(execution):
    with pytest.raises(SettingError, match=r"^[^\n]*writes in place to what a gradient needs[^\n]*clone[^\n]*$"):
        step(writing("multiplied"), steps=2, execution=execution)


@pytest.mark.parametrize("execution", ["vectorized", "traced"])
def test_other_ways_say_that_inputs_are_written_to(execution):
    with pytest.raises(SettingError, match="writes to its inputs or targets"):
        step(writing("multiplied"), execution=execution)


def test_a_loss_may_write_to_targets_and_outputs():
    def loss(outputs, targets):
        targets.clamp_(0, 1)
        return F.cross_entropy(outputs.mul_(2), targets)

    check_like_loop(lambda: CASE.network(), loss=loss)


class Rescaled(Perceptron):
    """Multiplies hidden values by what is drawn."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.b(self.draw(self.hidden(x)))


def seeded(x):
    torch.manual_seed(7)
    return x + torch.randn_like(x)


DRAWS = {
    "dropout": lambda: nn.Dropout(0.5),
    "RReLU": nn.RReLU,
    "noise": lambda: lambda x: x + torch.randn_like(x),
    "Python": lambda: lambda x: x * random.random(),
    "NumPy": lambda: lambda x: x * np.random.rand(),
    "a seed of its own": lambda: seeded,
}


def drawing(kind):
    torch.manual_seed(0)
    return Rescaled(DRAWS[kind]()).double()


def seed():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def states():
    of_numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), of_numpy[1].tolist(), of_numpy[2]


@pytest.mark.parametrize("settings", [{}, {"head": "prototypes"}, {"execution": "loop"}], ids=str)
@pytest.mark.parametrize("kind", DRAWS)
def test_the_first_meta_step_draws_what_later_ones_draw(kind, settings):
    maml, found = MAML(drawing(kind), inner_lr=0.1, inner_steps=2, **settings), []
    for _ in range(2):
        seed()
        loss = maml.training_step(CASE.episode(), 0).item()
        found.append((loss, states()))
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [{"execution": "loop"}, {"tasks_per_chunk": 1}], ids=str)
@pytest.mark.parametrize("kind", DRAWS)
def test_tasks_one_by_one_draw_what_the_plain_loop_draws(kind, settings):
    net, plain = drawing(kind), drawing(kind)
    seed()
    gradient, _ = step(net, 2, **settings)
    after = states()
    seed()
    expected = meta_gradient(plain, CASE.episode(), 0.1, 2, F.cross_entropy, outputs_before=False)
    assert relative_error(gradient, expected.gradient) < 1e-9
    assert states() == after


class Counts(Perceptron):
    """Counts its calls, which its outputs depend on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 10)


@pytest.mark.parametrize("head", ["learned", "prototypes"])
def test_each_meta_step_calls_the_network_as_often(head):
    torch.manual_seed(0)
    net = Counts().double()
    maml, counts = MAML(net, inner_lr=0.1, inner_steps=2, head=head), []
    for number in range(3):
        before = net.calls
        maml.training_step(CASE.episode(number), 0)
        counts.append(net.calls - before)
    tasks, calls = 3, 3 + (head == "prototypes")  # two steps, the queries, and the support set's features
    assert counts == [tasks * calls] * 3


class Mixed(Perceptron):
    """Mixes its inputs by a large tensor that is no buffer, and divides them by a number."""

    def __init__(self):
        super().__init__()
        self.mixing, self.divisor = torch.rand(12, 6, dtype=torch.float64), 0.0

    def forward(self, x):
        return super().forward(x @ self.mixing[:6]) * (2 + torch.atan(torch.ones(()) / self.divisor))

    def change(self):
        self.mixing.data[0, 1] = 3.0


def sign(net):
    net.divisor = -0.0


@pytest.mark.parametrize("change", [Mixed.change, sign])
def test_a_change_of_bits_takes_effect(change):
    torch.manual_seed(0)
    net, plain = Mixed().double(), Mixed().double()
    plain.load_state_dict(net.state_dict())
    plain.mixing = net.mixing.clone()
    maml = MAML(net, inner_lr=0.1, inner_steps=1)
    for _ in range(2):
        loss = maml.training_step(CASE.episode(), 0).item()
        expected = meta_gradient(plain, CASE.episode(), 0.1, 1, F.cross_entropy)
        assert loss == pytest.approx(expected.loss, rel=1e-9)
        change(net)
        change(plain)


class Clamped(Perceptron):
    """Limits its weights as it runs."""

    def forward(self, x):
        hidden = self.hidden(x)
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
        return self.b(hidden)


@pytest.mark.parametrize("settings", [{}, {"execution": "loop"}], ids=str)
def test_a_network_that_writes_to_its_parameters_is_the_plain_loop(settings):
    def make():
        torch.manual_seed(0)
        return Clamped().double()

    check_like_loop(make, steps=2, **settings)
