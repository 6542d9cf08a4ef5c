"""A meta-batch in chunks of tasks: the mean over all of them, and how many tasks a chunk has.

A function of a chunk adds the chunk's gradients to running sums, so that one chunk at a time is in memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maml_lightning.engine.kernels.layout import kernel_layout, sum_over_tasks
from maml_lightning.engine.memory import shared_bytes
from maml_lightning.episodes import Episode
from maml_lightning.structures import Part, mapped

Parameters = dict[str, Tensor]

# On a CPU, tasks that keep more than this are not vectorized together: memory would grow and time would not shrink.
VECTORIZED_BYTES = 128 * 2**20
# Of so few tasks, twice that: apart they would take a tenth more time (issue 23).
_FEW = 4


class MetaGradient(NamedTuple):
    """What one meta-batch yields.

    Args:
        loss: the outer loss, mean over tasks, a scalar.
        gradient: of ``loss`` with respect to each parameter that is not frozen, shaped like it.
        rates: of ``loss`` with respect to each inner learning rate, or what else the inner step learns, that requires
            a gradient, shaped like it.
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
    if size is None or size >= episode.tasks:
        return iter([episode])
    starts = range(0, episode.tasks, size)
    return (mapped(lambda tensor, start=start: tensor[start : start + size], episode) for start in starts)


def detached(part: Part) -> Part:
    """The tensors without their graphs, and copies of those made in inference mode, where nothing is recorded."""
    return mapped(lambda tensor: tensor.detach().clone() if tensor.is_inference() else tensor.detach(), part)


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
    trained = {name: value for name, value in params.items() if value.requires_grad}
    nothing = torch.zeros((), device=episode.device)
    total = MetaGradient(nothing, _zeros(trained or params), _zeros(rates), nothing)
    results = [function(chunk, total) for chunk in split(episode, size)]
    losses, predictions = (torch.cat(parts) for parts in zip(*results, strict=True))
    for value in (*total.gradient.values(), *total.rates.values()):
        value.div_(episode.tasks)
    return MetaGradient(losses.mean(), total.gradient, total.rates, predictions)


def chunk_size(bytes_per_task: int, tasks: int, device: torch.device) -> int:
    """How many tasks to vectorize together: the same on every process and in every run, for nothing is timed.

    Together tasks share the cost of starting each operator; apart they stay in the processor's caches and need less
    memory. On a GPU, where starting costs most, as many as memory has room for.

    Args:
        bytes_per_task: that a task keeps for the backward pass.
        tasks: in the meta-batch, ``T``.
        device: where they run.
    """
    each = max(bytes_per_task, 1)
    if device.type == "cpu":
        fitting = max(VECTORIZED_BYTES // each, min(2 * VECTORIZED_BYTES // each, _FEW))
    else:
        fitting = shared_bytes(device) // each
    most = max(min(fitting, tasks), 1)
    # Chunks of one size share their graphs; of unlike sizes they are at least nearly equal.
    even = next(size for size in range(most, 0, -1) if tasks % size == 0)
    return even if 2 * even > most else math.ceil(tasks / math.ceil(tasks / most))


def _zeros(values: Parameters) -> Parameters:
    return {name: kernel_layout(torch.zeros_like(value)) for name, value in values.items()}
