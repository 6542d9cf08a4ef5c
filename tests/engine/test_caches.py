"""Networks whose functions keep their results (functools.cache), against the plain loop."""

from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor, nn

from maml_lightning import MAML, Episode
from maml_lightning.engine.execution import FEW
from tests.engine.test_execution import difference_from_loop


@cache
def positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64)[:, None] / length


@cache
def half(length: int) -> int:
    return length // 2


class Cube(torch.autograd.Function):
    """Has no rule for vmap in a graph: runs vectorized or in a loop."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Net(nn.Module):
    """A layer and a function of it."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3), function

    def forward(self, x):
        return self.function(self, self.layer(x))

    @lru_cache(maxsize=8)  # noqa: B019
    def table(self, length):
        return torch.linspace(0, 1, length, dtype=torch.float64)[:, None]


FUNCTIONS = {
    "tensor": lambda net, x: (x + positions(len(x))).tanh(),
    "tensor, vectorized": lambda net, x: Cube.apply(x + positions(len(x))),
    "tensor of a method": lambda net, x: (x + net.table(len(x))).tanh(),
    "number": lambda net, x: x.tanh() / half(len(x)),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("tasks", [3, FEW])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kept_results_are_those_of_a_loop(name, tasks, called):
    torch.manual_seed(0)
    positions.cache_clear()
    net = Net(FUNCTIONS[name]).double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    if called:
        net(torch.rand(6, 4, dtype=torch.float64))  # and keeps what it needs for 6 examples, no others
    for examples in (6, 6, 7, 7):
        x, y = torch.randn(tasks, examples, 4, dtype=torch.float64), torch.randint(3, (tasks, examples))
        assert difference_from_loop(net, maml, Episode(x, y, x, y)) < 1e-9
        kept = positions(examples)
        assert type(kept) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)


def test_a_network_that_keeps_plain_values_is_traced(caplog):
    net = Net(FUNCTIONS["number"]).double()
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
    MAML(net, inner_lr=0.1).training_step(Episode(x, y, x, y), 0)
    assert "slower" not in caplog.text
