"""A network is called with other tensors, wherever it keeps its own now."""

import pytest
import torch
from torch import nn

from maml_lightning import MAML
from maml_lightning.algorithms import calling
from maml_lightning.algorithms.calling import call_with
from tests.engine.test_trials import gradient


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.b(torch.tanh(self.a(x))) * (1 + 0.01 * self.calls)


CHANGES = {
    "another layer": lambda net: setattr(net, "a", nn.Linear(4, 4)),
    "another parameter": lambda net: setattr(net.a, "weight", nn.Parameter(torch.ones(4, 4))),
    "a parameter less": lambda net: setattr(net.a, "bias", None),
    "a layer in between": lambda net: setattr(net, "b", nn.Sequential(net.b)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_were_replaced_get_the_tensors(change):
    net, x = Counting(), torch.rand(2, 4)
    with calling.calling(net):
        call_with(net, dict(net.named_parameters()), x)
        CHANGES[change](net)
        tensors = {name: torch.rand_like(value) for name, value in net.named_parameters()}
        own = dict(net.named_parameters())
        outputs = call_with(net, tensors, x)
    assert all(value is own[name] for name, value in net.named_parameters())
    net.calls -= 1
    assert torch.equal(outputs, torch.func.functional_call(net, tensors, (x,)))


def test_a_network_is_searched_for_its_tensors_once_in_a_meta_step(monkeypatch):
    found, places = [], calling._Places
    net = Counting().double()
    maml = MAML(net, inner_lr=0.1, inner_steps=2)
    gradient(maml)
    monkeypatch.setattr(calling, "_Places", lambda net: found.append(net) or places(net))
    gradient(maml)
    assert found == [net]


def test_tensors_are_put_back_after_an_error():
    net = nn.Linear(2, 3)
    own = dict(net.named_parameters())
    with pytest.raises(RuntimeError):
        call_with(net, {"weight": torch.ones(3, 5)}, torch.ones(1, 2))
    assert all(value is own[name] for name, value in net.named_parameters())
