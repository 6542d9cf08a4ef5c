"""A meta-batch in chunks of tasks: the mean over all of them, and the chunk size that is fastest.

A function of a chunk adds the chunk's gradients to running sums, so that one chunk at a time is in memory.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from maml_lightning.engine.execution import Executor
from maml_lightning.engine.kernels.layout import kernel_layout, sum_over_tasks
from maml_lightning.engine.memory import free_bytes, out_of_memory
from maml_lightning.episodes import Episode

Parameters = dict[str, Tensor]


class MetaGradient(NamedTuple):
    """What one meta-batch yields.

    Args:
        loss: the outer loss, mean over tasks, a scalar.
        gradient: of ``loss`` with respect to each parameter, shaped like it.
        rates: of ``loss`` with respect to each inner learning rate that requires a gradient, shaped like it.
        predictions: the adapted networks' outputs on the query inputs, ``[T, N*Q, ...]``.
    """

    loss: Tensor
    gradient: Parameters
    rates: Parameters
    predictions: Tensor


# Adds the gradients of a chunk's tasks to the sums; returns their losses [T] and predictions [T, N*Q, ...].
ChunkFunction = Callable[[Episode, MetaGradient], tuple[Tensor, Tensor]]


def split(episode: Episode, size: int | None) -> Iterator[Episode]:
    """The episode in chunks of at most ``size`` tasks; None takes all at once."""
    size = size or episode.tasks
    return (Episode(*parts) for parts in zip(*(tensor.split(size) for tensor in episode), strict=True))


def detached(tensor: Tensor) -> Tensor:
    """The tensor without its graph, and a copy of it if it was made in inference mode, where nothing is recorded."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def add_sum(total: Parameters, gradient: Parameters, step: int) -> None:
    """Add the sum over tasks to ``total``, or to the step's part of it where it has one for each inner step.

    Args:
        total: by name, shaped like the parameter, or ``[S, ...]`` with one value for each inner step.
        gradient: by name, ``[T, ...]``.
        step: the inner step; those beyond the last add to the last.
    """
    for name, value in gradient.items():
        target = total[name]
        if target.dim() == value.dim():
            target = target[min(step, len(target) - 1)]
        target += sum_over_tasks(value)


def mean_over_tasks(
    function: ChunkFunction, episode: Episode, params: Parameters, rates: Parameters, size: int | None
) -> MetaGradient:
    """The mean over tasks of what ``function`` adds up chunk by chunk.

    Args:
        function: of a chunk and the sums.
        episode: ``T`` tasks.
        params: what the gradient is of.
        rates: what the gradient of the inner learning rates is of.
        size: tasks in a chunk; None takes all.
    """
    total = MetaGradient(torch.zeros(()), _zeros(params), _zeros(rates), torch.zeros(()))
    results = [function(chunk, total) for chunk in split(episode, size)]
    losses, predictions = (torch.cat(parts) for parts in zip(*results, strict=True))
    for value in (*total.gradient.values(), *total.rates.values()):
        value.div_(episode.tasks)
    return MetaGradient(losses.mean(), total.gradient, total.rates, predictions)


def fastest_size(run: Callable[[Episode], object], episode: Episode, executor: Executor) -> int:
    """The chunk size that costs least per task, the same on every process; random draws here leave no trace.

    Args:
        run: computes one chunk.
        episode: ``T`` tasks to measure with.
        executor: what ``run`` runs on; it counts the bytes that a chunk keeps.
    """
    device, tasks = episode.support_inputs.device, episode.tasks

    def run_first(size: int) -> None:
        run(next(split(episode, size)))

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        size = max(tasks // 4, 1)
        executor.kept_bytes = 0
        run_first(size)
        fits = executor.kept_bytes * tasks / size < free_bytes(device) / 2
        if fits and tasks > size and _is_faster(run_first, tasks, size, device):
            size = tasks
        else:
            while size > 1 and _is_faster(run_first, max(size // 4, 1), size, device):
                size = max(size // 4, 1)
    best = [size]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(best)
    return best[0]


def _is_faster(run: Callable[[int], object], size: int, other: int, device: torch.device) -> bool:
    # In turns, for a machine is not equally fast at all times; a gain within the noise is none.
    taken: dict[int, list[float]] = {size: [], other: []}
    try:
        for _ in range(2):
            run(size)  # traces, compiles, warms up
        for _ in range(3):
            for each, times in taken.items():
                times.append(seconds(partial(run, each), device) / each)
    except RuntimeError as error:
        if out_of_memory(error):
            return False
        raise
    return min(taken[size]) < 0.97 * min(taken[other])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run``, until the device is done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _zeros(values: Parameters) -> Parameters:
    return {name: kernel_layout(torch.zeros_like(value)) for name, value in values.items()}
