import pytest
import torch

from maml_lightning.engine import chunks
from maml_lightning.engine.execution import Executor
from tests.reference import images


def sizes(function, episode):
    seen = []

    def run(chunk, total):
        seen.append(chunk.tasks)
        return function(chunk, total)

    return seen, run


def squares(chunk, total):
    """Of a weight ``w``: each task's loss is its first input times w, its predictions the query inputs."""
    first = chunk.support_inputs.flatten(1)[:, 0]
    chunks.add_sum(total.gradient, {"w": first[:, None].expand(-1, 2)}, 0)
    chunks.add_sum(total.rates, {"w": first[:, None]}, 5)
    return first, chunk.query_inputs


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5]), (None, [5])])
def test_the_mean_is_the_same_in_chunks_of_any_size(size, expected):
    episode = images(tasks=5)
    seen, run = sizes(squares, episode)
    params, rates = {"w": torch.zeros(2, dtype=torch.float64)}, {"w": torch.zeros(3, 1, dtype=torch.float64)}
    result = chunks.mean_over_tasks(run, episode, params, rates, size)
    first = episode.support_inputs.flatten(1)[:, 0]
    assert seen == expected
    assert result.loss.item() == pytest.approx(first.mean().item())
    assert torch.allclose(result.gradient["w"], first.mean().expand(2))
    assert torch.allclose(result.rates["w"][:, 0], torch.stack([0 * first[0], 0 * first[0], first.mean()]))
    assert torch.equal(result.predictions, episode.query_inputs)


@pytest.mark.parametrize(("seconds", "fastest"), [({2: 1.0, 8: 8.0}, 2), ({2: 1.0, 8: 3.0}, 8), ({1: 0.1, 2: 1.0}, 1)])
def test_the_fastest_size_per_task_is_taken(seconds, fastest, monkeypatch):
    running = []
    monkeypatch.setattr(chunks, "seconds", lambda run, device: (run(), seconds.get(running[-1], 99.0))[1])
    size = chunks.fastest_size(lambda chunk: running.append(chunk.tasks), images(tasks=8), Executor())
    assert size == fastest


def test_a_size_that_would_not_fit_is_not_tried(monkeypatch):
    executor, running = Executor(), []

    def run(chunk):
        running.append(chunk.tasks)
        executor.kept_bytes += 1000 * chunk.tasks

    monkeypatch.setattr(chunks, "free_bytes", lambda device: 15_999)
    monkeypatch.setattr(chunks, "seconds", lambda run, device: (run(), 1.0)[1])
    assert chunks.fastest_size(run, images(tasks=8), executor) == 2
    assert max(running) == 2
    monkeypatch.setattr(chunks, "free_bytes", lambda device: 16_001)
    assert chunks.fastest_size(run, images(tasks=8), executor) == 8


def test_running_out_of_memory_is_slow():
    def run(chunk):
        if chunk.tasks == 8:
            raise torch.OutOfMemoryError("out of memory")

    assert chunks.fastest_size(run, images(tasks=8), Executor()) < 8


def test_measuring_leaves_the_random_state():
    before = torch.get_rng_state()
    chunks.fastest_size(lambda chunk: torch.rand(3), images(tasks=4), Executor())
    assert torch.equal(torch.get_rng_state(), before)


def test_detached_is_usable_outside_of_inference_mode():
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert chunks.detached(tensor).requires_grad_().mul(2).sum().requires_grad
