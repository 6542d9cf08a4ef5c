"""A network adapted to one task, with the confidence in each of its predictions, and how that is calibrated."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maml_lightning.algorithms.prototypes import logits_and_norms
from maml_lightning.analysis.calibration import confidences, fitted, numbers_of
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import call, first_task, joined, leaves, mapped, plain, tasks_of, tensor_of


class Outputs(NamedTuple):
    """What an adapted network gives for queries.

    Args:
        probabilities: of the task's classes, ``[n, N]``.
        confidences: the probability ``[n]`` that a query is of one of the classes, and predicted right, as calibrated
            where as many queries are of none of them; without a calibration the highest probability.
    """

    probabilities: Tensor
    confidences: Tensor


class TaskNetwork:
    """A network adapted to one task of classification.

    Args:
        maml: the module.
        support: inputs ``[N*K, ...]``.
        targets: ``[N*K]``, int64 in ``[0, N)``.
    """

    def __init__(self, maml: Any, support: Any, targets: Tensor) -> None:
        self.network: nn.Module = maml.adapt(support, targets).eval()
        self.shots = targets.bincount()
        self._prototypes, self._weights = maml.head == "prototypes", calibration_of(maml)
        self._beside = support if maml.query_statistics == "batch" else None

    def together(self, inputs: Any) -> Outputs:
        """Those of inputs ``[n, ...]`` in one batch."""
        return self._of(*self._run(inputs))

    def alone(self, inputs: Any) -> Outputs:
        """Those of inputs ``[n, ...]``, each by itself: beside the support set, if the batch's statistics count."""
        return self._of(*self._run_alone(inputs))

    def numbers(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """What calibrates: the predicted classes ``[n]`` and `numbers_of` of inputs, each by itself."""
        logits, norms = self._run(inputs) if self._beside is None else self._run_alone(inputs)
        return logits.argmax(-1), numbers_of(logits, norms, self.shots)

    def _of(self, logits: Tensor, norms: Tensor | None) -> Outputs:
        probabilities = logits.softmax(-1)
        if self._weights is None:
            return Outputs(probabilities, probabilities.amax(-1))
        return Outputs(probabilities, confidences(self._weights, numbers_of(logits, norms, self.shots)))

    def _run(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            if self._prototypes:
                logits, norms = logits_and_norms(self.network, inputs)
            else:
                logits, norms = tensor_of(call(self.network, inputs)), None
        return logits[:, : len(self.shots)], norms

    def _run_alone(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        # In batches of one: in larger ones float32 rounds in another order, which trained logits of 80 show in the
        # sixth digit of a probability.
        each = [mapped(lambda part, n=n: part[n : n + 1], inputs) for n in range(len(leaves(inputs)[0]))]
        runs = [self._run(one if self._beside is None else joined([self._beside, one], 0)) for one in each]
        norms = [norms[-1:] for _, norms in runs if norms is not None]
        return torch.cat([logits[-1:] for logits, _ in runs]), torch.cat(norms) if norms else None


def calibration_of(maml: Any) -> list[float] | None:
    """The weights of a module's calibration; None without one, or where it was measured with other settings."""
    kept = maml.calibration
    return kept["weights"] if kept is not None and kept["settings"] == _settings(maml) else None


def task_outputs(maml: Any, batch: Any) -> Outputs | None:
    """The outputs of the queries of an episode's one task; None without a calibration.

    Each by itself, unless the statistics of the batch count: those are in one batch, as the episode has them.
    """
    if calibration_of(maml) is None:
        return None
    support, targets, queries, _ = Episode(*map(first_task, Episode.of(batch)))
    network = TaskNetwork(maml, support, targets)
    return network.together(queries) if maml.query_statistics == "batch" else network.alone(queries)


def _settings(maml: Any) -> dict[str, Any]:
    return {name: getattr(maml, name) for name in ("head", "query_statistics", "eval_inner_steps")}


def calibrate(maml: Any, batches: Iterable[Episode], episodes: int) -> int:
    """Measure the calibration of a module on episodes of validation classes.

    In each episode, a part of the classes is the support set, of several sizes down from a half, with one and with all
    examples per class. As many classes of the rest are those of unknown queries. All sizes count the same.

    Args:
        maml: the module, which gets the calibration.
        batches: episodes of classification, of at least 4 classes.
        episodes: how many of them are used, at most.

    Returns:
        the number of queries.

    Raises:
        SettingError: an episode is not one of classification, or has fewer than 4 classes.
    """
    tasks = chain.from_iterable(tasks_of(Episode.of(batch).check()) for batch in batches)
    numbers, right, importance = [], [], []
    for task in islice(tasks, episodes):
        for support, queries in _parts(maml, Episode(*map(plain, task))):
            network = TaskNetwork(maml, *support)
            predicted, found = network.numbers(queries[0])
            numbers.append(found.cpu())
            right.append((predicted == queries[1]).cpu())  # an unknown query's class is beyond those predicted
            importance.append(torch.full((len(found),), 1 / len(found), dtype=found.dtype))
    if not numbers:
        raise SettingError("calibrate needs episodes of validation classes (got none); see the data module's settings.")
    weights = fitted(torch.cat(numbers), torch.cat(right), torch.cat(importance))
    maml.calibration = {"weights": weights, "settings": _settings(maml)}
    return sum(map(len, right))


def _parts(maml: Any, task: Episode) -> list[tuple[tuple[Any, Tensor], tuple[Any, Tensor]]]:
    """Smaller tasks of an episode: support sets, and queries of their classes and of as many others."""
    targets = task.support_targets
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        raise SettingError("calibrate needs episodes of classification (got other targets); give such data.")
    ways, shots = int(targets.max()) + 1, int(targets.bincount().max())
    most = ways if maml.head == "prototypes" else maml(task.support_inputs).shape[-1]
    sizes = {min(ways >> halvings, most) for halvings in range(1, ways.bit_length() - 1)}
    if not sizes:
        raise SettingError(f"calibrate needs episodes of at least 4 classes (got {ways}); raise data.ways.")
    ranks = torch.stack([(targets[:n] == target).sum() for n, target in enumerate(targets)])
    parts = []
    for classes in sorted(sizes):
        queries = _chosen(task.query_inputs, task.query_targets, task.query_targets < 2 * classes)
        for each in {1, shots}:
            chosen = (targets < classes) & (ranks < each)
            parts.append((_chosen(task.support_inputs, targets, chosen), queries))
    return parts


def _chosen(inputs: Any, targets: Tensor, chosen: Tensor) -> tuple[Any, Tensor]:
    return mapped(lambda part: part[chosen], inputs), targets[chosen]
