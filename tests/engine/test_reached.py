"""Which networks may call an operator that has no second derivative; those that do not run without the mode."""

import operator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import hardsigmoid as renamed

from maml_lightning.engine.kernels.mode import TaskKernels, loop_operators
from tests.zoo.test_zoo import BY_NAME


def helper(x):
    return renamed(x)


class Calls(nn.Module):
    def __init__(self, act, inner=None):
        super().__init__()
        self.layer, self.act, self.kept = nn.Linear(2, 2), act, [inner]

    def forward(self, x):
        return self.act(self.layer(x))


class Held:
    def __init__(self):
        self.act = F.hardsigmoid


class InTable(Calls):
    acts = {"own": F.hardsigmoid}  # noqa: RUF012


class OfClass(Calls):
    kind = nn.Hardsigmoid


HARD = "hard"
CHANGING = F.relu


def changing(x):
    return CHANGING(x)


def hooked():
    net = nn.Linear(2, 2)
    net.register_forward_hook(lambda layer, args, output: F.hardsigmoid(output))
    return net


CALL = {
    "function": lambda: Calls(F.hardsigmoid),
    "builtin function": lambda: Calls(torch.lstm),
    "lambda": lambda: Calls(lambda x: F.hardsigmoid(x)),
    "function of a function": lambda: Calls(lambda x: helper(x)),
    "attrgetter": lambda: Calls(lambda x: operator.attrgetter(HARD + "sigmoid")(F)(x)),
    "variables": lambda: Calls(lambda x: vars(F)[HARD + "sigmoid"](x)),
    "dictionary of a module": lambda: Calls(lambda x: F.__dict__[HARD + "sigmoid"](x)),
    "imported by name": lambda: Calls(lambda x: __import__("operator").methodcaller(HARD + "sigmoid", x)(F)),
    "closure": lambda: (lambda act: Calls(lambda x: act(x)))(F.hardsigmoid),
    "partial": lambda: Calls(partial(F.hardsigmoid, inplace=False)),
    "bound method": lambda: Calls(nn.Hardsigmoid().forward),
    "layer": lambda: nn.Sequential(nn.Linear(2, 2), nn.Hardsigmoid()),
    "base class": lambda: nn.InstanceNorm2d(2),
    "layer in a list": lambda: Calls(torch.tanh, nn.EmbeddingBag(2, 2)),
    "object": lambda: Calls(torch.tanh, Held()),
    "hook": hooked,
    "recurrent": lambda: nn.LSTM(2, 2),
    "name made by code": lambda: Calls(lambda x: getattr(F, HARD + "sigmoid")(x)),
    "layer made in the call": lambda: Calls(lambda x: nn.Hardsigmoid()(x)),
    "table of a class": lambda: InTable(torch.tanh),
    "class of a class": lambda: OfClass(torch.tanh),
    "unknown": lambda: Calls(torch.tanh, iter([1])),
}


@pytest.mark.parametrize("kind", CALL)
def test_a_network_that_may_call_a_replaced_operator_runs_in_the_mode(kind):
    assert isinstance(loop_operators(CALL[kind]()), TaskKernels)


@pytest.mark.parametrize("name", ["counter", "hooks", "running mean in use", "spectral_norm", "checkpoint"])
def test_other_networks_run_without_it(name):
    assert not isinstance(loop_operators(BY_NAME[name].network()), TaskKernels)


def test_a_global_that_changes_is_read_anew(monkeypatch):
    net = Calls(changing)
    assert not isinstance(loop_operators(net), TaskKernels)
    monkeypatch.setattr("tests.engine.test_reached.CHANGING", F.hardsigmoid)
    assert isinstance(loop_operators(net), TaskKernels)
