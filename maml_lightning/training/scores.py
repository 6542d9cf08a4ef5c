"""Scores of episodes, and the table that holds them: a row for each episode, the same on all processes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning.devices import has_values, on_device, widest
from maml_lightning.structures import mapped, tasks_of
from maml_lightning.training.metrics import metric_name, metric_scores

# Columns of the rows. The scores are those of each name in `Scoring.names`, a column for each step.
NUMBER, FINITE, LOSS, SCORES = 0, 1, 2, 3

Loss = Callable[[Any, Any], Tensor]
# Those whose targets are classes or labels: floats are probabilities or labels then, and outputs no estimates of them.
_OF_CLASSES = (F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss)
_OF_LABELS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.multilabel_soft_margin_loss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.MultiLabelSoftMarginLoss,
)


class Score(NamedTuple):
    """How outputs are scored.

    Args:
        name: accuracy, or mse, the mean squared error.
        classes: the dimension of an episode's outputs ``[N*Q, ...]`` that the classes are in; None of one logit, which
            is above 0 for class 1.
    """

    name: Literal["accuracy", "mse"]
    classes: int | None = None


class Scoring(NamedTuple):
    """What is logged of episodes beside their loss.

    Args:
        loss: of (outputs, targets).
        score: accuracy or mean squared error; None where the shapes of outputs and targets allow neither.
        metric: of the user's choice.
        of_all: whether the loss takes all that the network returns, of which the scored outputs are a part.
    """

    loss: Loss
    score: Score | None
    metric: Any = None
    of_all: bool = False

    @property
    def names(self) -> list[str]:
        """The names of what is logged after each step, the headline first: the loss where there is nothing else.

        A metric that is called as the score is logged in its place.
        """
        score = [] if self.score is None else [self.score.name]
        metric = [] if self.metric is None else [metric_name(self.metric)]
        return list(dict.fromkeys([*score, *metric])) or ["loss"]

    def training_means(self, loss: Tensor, outputs: Tensor, targets: Any) -> dict[str, Tensor]:
        """The means over a meta-batch's episodes that are logged in training, scalars by name."""
        found = {"loss": loss.detach()}
        if self.score is not None:
            scores = episode_scores([outputs], targets, self.score, ignored_target(self.loss))
            found[self.score.name] = scores.mean().to(loss.dtype)
        return found

    def rows(
        self, outputs: list[Tensor], targets: Any, numbers: Sequence[int], losses: Sequence[Tensor] = ()
    ) -> Tensor:
        """The rows of an evaluated batch; all is NaN where an output is not finite, scores also where no target counts.

        Args:
            outputs: on the query inputs before adaptation and after each inner step, each ``[T, N*Q, ...]``.
            targets: ``[T, N*Q, ...]``.
            numbers: of the episodes, see `episode_rows`.
            losses: of each step, ``[T]``, where they are not of these outputs alone; empty where they are.

        Returns:
            ``[T, 3 + names * (steps + 1)]``: number, whether all is finite, loss, and each step's scores by name.
        """
        finite = torch.stack(outputs, 1).isfinite().flatten(1).all(1)
        if losses:  # of outputs that are not here
            finite = finite & torch.stack([*losses], 1).isfinite().all(1)
        wide = torch.promote_types(outputs[-1].dtype, torch.float)
        columns = outputs[-1].new_full((len(finite), 1 + len(self.names) * len(outputs)), torch.nan, dtype=wide)
        # All at once where all are finite, as they usually are: each choice of some waits for a GPU.
        if not has_values(finite) or finite.all():
            columns = self._columns(outputs, targets, wide, losses)
        elif finite.any():
            kept = mapped(lambda part: part[finite], (outputs, targets, [*losses]))
            columns[finite] = self._columns(kept[0], kept[1], wide, kept[2])
        if self.score is not None and self.score.name == "mse":  # which may overflow
            finite = finite & columns[:, 1 : 1 + len(outputs)].isfinite().all(1)
            columns = columns.masked_fill(~finite[:, None], torch.nan)
        return episode_rows(numbers, finite, columns)

    def _columns(self, outputs: list[Tensor], targets: Any, dtype: torch.dtype, losses: Sequence[Tensor]) -> Tensor:
        last = self.losses(outputs[-1:], targets, losses[-1:])
        return torch.cat([last.to(dtype), self.columns(outputs, targets, losses).to(dtype)], 1)

    def losses(self, outputs: list[Tensor], targets: Any, known: Sequence[Tensor] = ()) -> Tensor:
        """The losses of each episode after each step, ``[T, steps]``: those that are ``known``, or of the outputs."""
        return torch.stack([*known] or [episode_losses(self.loss, output, targets) for output in outputs], 1)

    def by_name(self, rows: Tensor) -> dict[str, Tensor]:
        """Each episode's scores before adaptation and after each inner step, ``[T, steps + 1]`` by name."""
        return dict(zip(self.names, rows[:, SCORES:].chunk(len(self.names), 1), strict=True))

    def means(self, rows: Tensor) -> dict[str, Tensor]:
        """The means over rows of evaluated episodes by what they are logged as: ``NAME``, and ``NAME_step_0`` …."""
        found: dict[str, Tensor] = {}
        for name, scores in self.by_name(rows).items():
            means = scores.nanmean(0)  # a metric may not be defined of each episode
            found |= {f"{name}_step_{step}": mean for step, mean in enumerate(means)}
            found[name] = means[-1]
        return {**found, "loss": rows[:, LOSS].mean()}

    def predictions(self, outputs: Tensor, support_targets: Any) -> Tensor:
        """What an adapted network predicts: class probabilities, where an example has one class, else its outputs.

        Args:
            outputs: ``[T, N*Q, ...]``.
            support_targets: ``[T, N*K]``; a network may have more outputs than a task has classes.
        """
        if self.score is None or self.score.classes is None:
            return outputs
        if support_targets.dim() == 2 and support_targets.numel() and (classes := int(support_targets.max()) + 1) > 0:
            outputs = outputs[..., :classes]
        return outputs.softmax(self.score.classes + 1)

    def columns(self, outputs: list[Tensor], targets: Any, losses: Sequence[Tensor] = ()) -> Tensor:
        """What is logged of each episode: ``[T, names * steps]``; arguments as in `rows`."""
        found: dict[str, Tensor] = {}
        if self.score is not None:
            found[self.score.name] = episode_scores(outputs, targets, self.score, ignored_target(self.loss))
        if self.metric is not None:
            found[metric_name(self.metric)] = metric_scores(self.metric, outputs, targets)
        if not found:
            found["loss"] = self.losses(outputs, targets, losses)
        return torch.cat([found[name].float() for name in self.names], 1)


def is_one_of(loss: Any, kinds: Sequence[Any]) -> bool:
    """Whether a loss is one of functions and classes, or a partial of one."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return any(loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds)


def is_of_classes(loss: Any) -> bool:
    """Whether a loss is PyTorch's cross entropy or negative log likelihood of classes."""
    return is_one_of(loss, _OF_CLASSES)


def is_of_labels(loss: Any) -> bool:
    """Whether a loss is one of PyTorch's of several labels, each of them yes, no or a probability."""
    return is_one_of(loss, _OF_LABELS)


def class_dimensions(outputs: Tensor, targets: Tensor) -> list[int]:
    """The dimensions of an episode's outputs that classes can be in: dimension 1 as in cross_entropy, or the last."""
    return [
        dim
        for dim in dict.fromkeys((1, outputs.dim() - 1))
        if outputs.dim() == targets.dim() + 1 and (*outputs.shape[:dim], *outputs.shape[dim + 1 :]) == targets.shape
    ]


def score_of(loss: Loss, outputs: Tensor, targets: Any, all_targets: Any = None, of_all: bool = False) -> Score | None:
    """How an episode's outputs can be scored; None where shapes or loss allow no score.

    Args:
        loss: of outputs and targets. It decides where classes could be in two dimensions: if not, it is dimension 1.
        outputs: ``[N*Q, ...]``.
        targets: ``[N*Q, ...]``.
        all_targets: of the whole batch; one logit is of targets 0 and 1 alone.
        of_all: whether the loss takes more than these outputs.
    """
    if not isinstance(targets, Tensor):
        return None
    dims = class_dimensions(outputs, targets)
    one_each = outputs.shape == targets.shape or any(outputs.shape[dim] == 1 for dim in dims)
    if targets.is_floating_point():
        return Score("mse") if one_each and not is_one_of(loss, (*_OF_CLASSES, *_OF_LABELS)) else None
    if one_each:
        values = targets if all_targets is None else all_targets
        labels = (values == 0) | (values == 1) | (values == ignored_target(loss))
        return Score("accuracy") if not has_values(values) or labels.all() else None
    if len(dims) == 2 and not is_of_classes(loss) and not of_all and has_values(targets):
        dims.sort(key=lambda dim: _loss_where_right(loss, outputs, targets, dim))
    return Score("accuracy", dims[0]) if dims else None


def _loss_where_right(loss: Loss, outputs: Tensor, targets: Tensor, dim: int) -> float:
    """The loss of outputs that are right if the classes are in a dimension."""
    classes = targets.long().clamp(0, outputs.shape[dim] - 1).unsqueeze(dim)
    with torch.no_grad():
        return float(loss(torch.zeros_like(outputs).scatter(dim, classes, 10.0), targets))


def ignored_target(loss: Callable[..., Tensor]) -> int:
    """The target that a loss leaves out: its ``ignore_index``, or that of `torch.nn.functional.cross_entropy`, -100."""
    if isinstance(loss, functools.partial):
        ignored = loss.keywords.get("ignore_index")
    else:
        ignored = getattr(loss, "ignore_index", None)
    return ignored if isinstance(ignored, int) else -100


def episode_scores(outputs: list[Tensor], targets: Tensor, score: Score, ignored: int = -100) -> Tensor:
    """Accuracy or mean squared error of each episode after each step, over all examples (and pixels).

    Targets that are ignored, or no class of the network's, do not count. Where none of an episode's does, its accuracy
    is NaN.

    Args:
        outputs: of each step, ``[T, N*Q, ...]``.
        targets: ``[T, N*Q]``, ``[T, Q, D]`` or ``[T, Q, H, W]``.
        score: what to compute, see `score_of`.
        ignored: a target that does not count, see `ignored_target`.

    Returns:
        ``[T, steps]``.
    """
    if score.name == "mse":
        errors = ((output.reshape(targets.shape) - targets).float().square() for output in outputs)
        return torch.stack([error.flatten(1).mean(1) for error in errors], 1)
    counts = targets != ignored
    if score.classes is not None:
        counts = counts & (targets >= 0) & (targets < outputs[0].shape[score.classes + 1])
    correct = [((predicted == targets) & counts).flatten(1).sum(1) for predicted in _predicted(outputs, targets, score)]
    return torch.stack([number.float() / counts.flatten(1).sum(1) for number in correct], 1)


def _predicted(outputs: list[Tensor], targets: Tensor, score: Score) -> Iterator[Tensor]:
    for output in outputs:
        yield output.reshape(targets.shape) > 0 if score.classes is None else output.argmax(score.classes + 1)


def episode_losses(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The loss of each episode, ``[T]``.

    Args:
        loss: of an episode's outputs and targets.
        outputs: ``[T, N*Q, ...]``.
        targets: ``[T, N*Q, ...]``.
    """
    values = [loss(output, target).reshape(()) for output, target in zip(outputs, tasks_of(targets), strict=True)]
    return torch.stack(values).detach()


def episode_rows(numbers: Sequence[int], finite: Tensor, *columns: Tensor) -> Tensor:
    """A row for each episode of a batch.

    Args:
        numbers: of the episodes in their split, else of their batch.
        finite: whether the adapted networks' outputs are, ``[T]``.
        columns: what else is known of each episode, ``[T]`` or ``[T, n]``.

    Returns:
        ``[T, columns]``, float64 where the device has it.
    """
    parts = [on_device(numbers, finite.device), finite, *columns]
    return torch.cat([part.to(widest(finite.device)).reshape(len(finite), -1) for part in parts], 1)
