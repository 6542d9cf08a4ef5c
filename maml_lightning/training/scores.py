"""Scores of episodes, and the table that holds them: a row for each episode, the same on all processes."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maml_lightning.episodes import Episode

# Columns of the rows.
NUMBER, FINITE, LOSS, SCORES = 0, 1, 2, 3


def score_name(episode: Episode) -> str:
    """``accuracy`` of classification, ``mse`` of regression."""
    return "mse" if episode.query_targets.is_floating_point() else "accuracy"


def ignored_target(loss: Callable[..., Tensor]) -> int:
    """The target that a loss leaves out: its ``ignore_index``, or that of `torch.nn.functional.cross_entropy`, -100."""
    if isinstance(loss, functools.partial):
        ignored = loss.keywords.get("ignore_index")
    else:
        ignored = getattr(loss, "ignore_index", None)
    return ignored if isinstance(ignored, int) else -100


def episode_scores(outputs: list[Tensor], targets: Tensor, ignored: int = -100) -> Tensor:
    """Accuracy, or of float targets mean squared error, of each episode after each step.

    Targets that are ignored, or no class of the network's, do not count. Where none of an episode's does, its accuracy
    is NaN.

    Args:
        outputs: of each step, ``[T, N*Q, ...]``.
        targets: ``[T, N*Q]`` or ``[T, Q, D]``.
        ignored: a target that does not count, see `ignored_target`.

    Returns:
        ``[T, steps]``.
    """
    if targets.is_floating_point():
        scores = [(output - targets).float().square().flatten(1).mean(1) for output in outputs]
    else:
        counts = (targets != ignored) & (targets >= 0) & (targets < outputs[0].shape[-1])
        correct = [((output.argmax(-1) == targets) & counts).flatten(1).sum(1) for output in outputs]
        scores = [number.float() / counts.flatten(1).sum(1) for number in correct]
    return torch.stack(scores, 1)


def episode_rows(numbers: Sequence[int], finite: Tensor, *columns: Tensor) -> Tensor:
    """A row for each episode of a batch.

    Args:
        numbers: of the episodes in their split, else of their batch.
        finite: whether the adapted networks' outputs are, ``[T]``.
        columns: what else is known of each episode, ``[T]`` or ``[T, n]``.

    Returns:
        ``[T, columns]``, float64 where the device has it.
    """
    wide = torch.float32 if finite.device.type == "mps" else torch.float64
    parts = [torch.tensor(numbers, device=finite.device), finite, *columns]
    return torch.cat([part.to(wide).reshape(len(finite), -1) for part in parts], 1)


def evaluation_rows(
    outputs: list[Tensor], targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor], numbers: Sequence[int]
) -> Tensor:
    """The rows of an evaluated batch; scores are NaN where an output is not finite or no target counts.

    Args:
        outputs: on the query inputs before adaptation and after each inner step, each ``[T, N*Q, ...]``.
        targets: ``[T, N*Q]`` or ``[T, Q, D]``.
        loss: of (outputs, targets); it is the batch's, without the episodes whose scores are NaN.
        numbers: of the episodes, see `episode_rows`.

    Returns:
        ``[T, 3 + steps + 1]``: number, whether all is finite, loss, scores.
    """
    scores = episode_scores(outputs, targets, ignored_target(loss))
    finite = torch.stack(outputs, 1).isfinite().flatten(1).all(1)
    if targets.is_floating_point():
        finite &= scores.isfinite().all(1)
    scores[~finite] = torch.nan
    kept = ~scores.isnan().any(1)
    value = outputs[-1].new_zeros(())
    if kept.any():
        value = loss(outputs[-1][kept].flatten(0, 1), targets[kept].flatten(0, 1))
    return episode_rows(numbers, finite, value.expand(len(targets)), scores)


def predictions(outputs: Tensor, support_targets: Tensor) -> Tensor:
    """What an adapted network predicts: class probabilities, of regression its outputs.

    Args:
        outputs: ``[T, N*Q, ...]``.
        support_targets: ``[T, N*K]``; a network may have more outputs than a task has classes.
    """
    if support_targets.is_floating_point():
        return outputs
    return outputs[..., : int(support_targets.max()) + 1].softmax(-1)
