import pytest
import torch

from maml_lightning.engine import chunks
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


@pytest.mark.parametrize(
    ("megabytes", "tasks", "size"),
    [(1, 32, 32), (10, 32, 8), (40, 32, 4), (100, 32, 2), (300, 32, 1), (0, 7, 7), (64, 7, 4), (20, 7, 4), (18, 7, 7)],
)
def test_tasks_that_need_little_memory_are_vectorized_together(megabytes, tasks, size):
    assert chunks.chunk_size(megabytes * 2**20, tasks, torch.device("cpu")) == size


def test_detached_is_usable_outside_of_inference_mode():
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert chunks.detached(tensor).requires_grad_().mul(2).sum().requires_grad
