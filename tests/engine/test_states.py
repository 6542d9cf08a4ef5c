"""Graphs are kept of the latest states, as long as states are used more often than they change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML
from maml_lightning.engine.states import (
    MAX_SIGNATURES,
    MAX_STATES,
    PATIENCE,
    PATIENCE_ON_GPU,
    WINDOW,
    Signatures,
    States,
)
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error

CPU = torch.device("cpu")


class Annealed(nn.Linear):
    temperature = 1.0

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x) / self.temperature


def numbers(keys):
    forgotten = []
    states = States(forgotten.append)
    return [states.number(key) for key in keys], forgotten


def test_a_state_of_each_epoch_is_traced_however_many_there_are():
    found, forgotten = numbers([epoch for epoch in range(50) for _ in range(3)])
    assert found == [1 + step // 3 for step in range(150)]
    assert forgotten == list(range(1, 50 - MAX_STATES + 1))


def test_a_state_that_comes_back_has_its_number():
    assert numbers("abababab") == ([1, 2] * 4, [])


def test_a_state_of_each_step_is_not_traced_until_it_stays():
    found, _ = numbers([*range(30), *["stays"] * WINDOW])
    assert found[:30] == [*range(1, MAX_STATES + 1), *[None] * (30 - MAX_STATES)]
    assert found[-1] is not None
    assert found[30] is None


def test_a_state_that_was_not_used_lately_makes_room():
    found, forgotten = numbers([*"aaaaaaaaaaaaaaaa", *"bcccdddeeefffggghhhaiii", "b"])
    assert forgotten[0] == 2  # b: a was used again
    assert found[-1] not in (2, None)


def test_the_signatures_of_the_first_meta_step_pay_at_once():
    signatures = Signatures()
    for time in (7, 8):
        assert signatures.pays("three tasks", time, CPU)
        assert signatures.pays("the task that is left", time, CPU)


@pytest.mark.parametrize(("device", "patience"), [("cpu", PATIENCE), ("cuda", PATIENCE_ON_GPU)])
def test_further_signatures_pay_after_ever_more_meta_steps_however_often_each_calls(device, patience):
    signatures = Signatures()
    signatures.pays("first", 0, CPU)
    waited = {"a": 0, "b": 0, "c": 0}
    for time in range(1, 5 * patience):
        for name in waited:
            first, *others = (signatures.pays(name, time, torch.device(device)) for _ in range(3))
            assert others == [first, first]
            waited[name] += not first
    assert waited == {"a": patience + 1, "b": 2 * patience + 1, "c": 3 * patience + 1}


def test_signatures_without_end_are_not_counted_without_end():
    signatures = Signatures()
    assert [signatures.pays(length, length, CPU) for length in range(2 * MAX_SIGNATURES)].count(True) == 1
    assert len(signatures._counts) == MAX_SIGNATURES


@pytest.mark.parametrize("times", [1, 3])
def test_an_annealed_temperature_is_exact_and_traced_where_it_stays_a_few_steps(times):
    net = Annealed().double()
    plain, maml = copy.deepcopy(net), MAML(net, inner_lr=0.1, inner_steps=1)
    executor = maml._inner_loop._executor
    for epoch in range(12):
        net.temperature = plain.temperature = 1.0 + epoch
        for _ in range(times):
            _, expected = reference(plain, episode(), 0.1, 1, F.cross_entropy)
            assert relative_error(gradient(maml), expected) < 1e-9
    assert {key[1] for key in executor._graphs} == {1: {5, 6, 7, 8}, 3: set(range(5, 13))}[times]
