import pytest
import torch
import torch.nn.functional as F
from torch.func import grad

from maml_lightning.engine.execution import FEW_TASKS, Executor
from maml_lightning.engine.jobs import Job


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


@pytest.mark.parametrize("tasks", [FEW_TASKS - 1, FEW_TASKS])
def test_a_new_shape_runs_without_a_graph_until_a_later_meta_step(tasks, monkeypatch):
    executor, ran = Executor(), []
    for name in ("in_loop", "untraced"):
        own = getattr(Job, name)
        monkeypatch.setattr(Job, name, lambda job, name=name, own=own: ran.append((name, job.tasks())) or own(job))

    def run(length, times=1):
        state = executor.state(())
        p, x = torch.rand(2, tasks, length, dtype=torch.float64)
        for _ in range(times):
            outputs, pullback = executor.vjp(state.bind(sine), (0, 0), p, x)
            torch.testing.assert_close(outputs, (p * x).sin(), rtol=1e-9, atol=0)
            torch.testing.assert_close(pullback(torch.ones_like(x)), x * (p * x).cos(), rtol=1e-9, atol=0)

    run(3)
    assert len(executor._graphs) == 1
    ran.clear()
    run(4, times=2)  # inner steps of one meta-step
    assert len(executor._graphs) == 1
    assert {name for name, count in ran if count == tasks} == {"in_loop" if tasks < FEW_TASKS else "untraced"}
    run(4)
    assert len(executor._graphs) == 2


def sine(objects, p, x):
    return (p * x).sin()
