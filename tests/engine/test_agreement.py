"""Whether results agree: what rounding explains, and what it does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maml_lightning.engine.agreement import disagreement, pullback_disagreement, untraced_disagreement
from maml_lightning.engine.differentiation import is_by_autograd
from maml_lightning.engine.jobs import Job
from maml_lightning.engine.state import State

GRADIENT = torch.tensor([[1.0, -1.0, 2.0, -2.0]])


def _to_rate(cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pullback of a step to its learning rate: the inner product of cotangent and gradient."""
    return {"lr": -(cotangents["w"] * GRADIENT).sum(1, keepdim=True)}


def test_rounding_explains_what_it_leaves_of_terms_that_cancel():
    cotangents = {"w": torch.tensor([[1.0, 1.0, 1.0, 1.001]])}  # of the terms 1, -1, 2 and -2.002, -0.002 is left
    expected = _to_rate(cotangents)
    rounded = {"lr": expected["lr"] + 0.02}  # ten times the gradient, and half a percent of the terms
    assert disagreement(rounded, expected)
    assert not pullback_disagreement(rounded, _to_rate, cotangents)


def test_an_error_as_large_as_the_terms_is_one():
    cotangents = {"w": torch.tensor([[1.0, 1.0, 1.0, 1.001]])}
    wrong = {"lr": _to_rate(cotangents)["lr"] + 1.0}
    assert "differs from a loop" in pullback_disagreement(wrong, _to_rate, cotangents)


def test_other_signs_leave_random_numbers_as_they_are():
    cotangents, before = {"w": torch.tensor([[1.0, 1.0, 1.0, 1.001]])}, torch.get_rng_state()
    pullback_disagreement({"lr": torch.ones(1, 1)}, _to_rate, cotangents)
    assert torch.equal(torch.get_rng_state(), before)


def _random(objects, weight, x):
    """A random part of squares, of which the objects scale the values and the gradient where no loop runs."""
    calls, of_value, of_gradient = objects
    calls.append(is_by_autograd())
    square = F.dropout(weight * x, 0.5).square()
    if calls[-1]:
        return square
    return of_value * square.detach() + of_gradient * (square - square.detach())


@pytest.mark.parametrize("pullback", [True, False])
@pytest.mark.parametrize(("of_value", "of_gradient"), [(1, 1), (2, 1), (1, 2)])
def test_a_function_that_draws_numbers_is_compared_in_one_run_of_each_kind(of_value, of_gradient, pullback):
    calls, args = [], (torch.ones(1, 99, dtype=torch.float64), torch.rand(1, 99, dtype=torch.float64))
    job = Job(State((calls, of_value, of_gradient), None, None).bind(_random), (0, 0), args, pullback, False)
    differs = of_value != 1 or (pullback and of_gradient != 1)
    assert bool(untraced_disagreement(job)) == differs
    assert calls == [True, False]
