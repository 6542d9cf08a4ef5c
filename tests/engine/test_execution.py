import torch
import torch.nn.functional as F
from torch.func import grad

from maml_lightning.engine.execution import Executor


def test_the_second_derivative_of_mse_loss_is_traced(caplog):
    executor, x = Executor(), torch.rand(4, 3, dtype=torch.float64)
    derivative = grad(lambda p: F.mse_loss(p**3, torch.zeros_like(p)))
    outputs, pullback = executor.vjp(derivative, (0,), x)
    assert torch.allclose(outputs, 2 * x**5)  # the mean of p^6 over 3
    assert torch.allclose(pullback(torch.ones_like(x)), 10 * x**4)
    assert "untraced" not in caplog.text


def test_pullback_is_that_of_autograd():
    executor, x = Executor(), torch.rand(4, 3, dtype=torch.float64)
    outputs, pullback = executor.vjp(lambda p, x: {"w": (p["w"] * x).sin()}, (None, 0), {"w": torch.ones_like(x[0])}, x)
    assert torch.allclose(outputs["w"], x.sin())
    assert torch.allclose(pullback({"w": torch.full_like(x, 2)})["w"], 2 * x * x.cos())
