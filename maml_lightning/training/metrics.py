"""A metric of the user's choice: its name in the logs, and its value for each episode."""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from maml_lightning.errors import SettingError
from maml_lightning.structures import describe, tasks_of


def created(metric: Any) -> Any:
    """The metric itself; of a class an instance.

    Raises:
        SettingError: it cannot be called, or its class needs arguments.
    """
    if isinstance(metric, type):
        try:
            return metric()
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"model.metric {metric.__name__} cannot be created without arguments ({_line(error)}); give them, such "
                f"as {metric.__name__}(...), or --model.metric.NAME."
            ) from error
    if metric is not None and not callable(metric):
        raise SettingError(
            f"model.metric must be a torchmetrics metric or a function of (outputs, targets) (got {metric!r:.80})."
        )
    if metric is not None and metric_name(metric) == "loss":
        raise SettingError("model.metric loss would be logged as the loss is, val/loss; give it another name.")
    return metric


def metric_name(metric: Any) -> str:
    """What a metric is logged as: a function's name; of an object its class's, as ``multiclass_f1_score``."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    name = getattr(metric, "__name__", None) or type(metric).__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.sub(r"\W+", "_", words).strip("_") or "metric"


def metric_scores(metric: Any, outputs: list[Tensor], targets: Any) -> Tensor:
    """The metric of each episode after each step, computed afresh for each of them.

    Metrics of torchmetrics.classification get floats that are whole numbers, such as those of several labels, as
    integers, which they ask for.

    Args:
        metric: of torchmetrics, or a function of an episode's outputs and targets.
        outputs: of each step, ``[T, N*Q, ...]``.
        targets: ``[T, N*Q, ...]``.

    Returns:
        ``[T, steps]``.

    Raises:
        SettingError: it cannot be computed, or is not one number.
    """
    value = _function(metric, outputs[0].device)
    rows = [
        [_number(metric, value, step[task], target) for step in outputs]
        for task, target in enumerate(tasks_of(targets))
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _function(metric: Any, device: torch.device) -> Callable[[Tensor, Any], Any]:
    if not isinstance(metric, Metric):
        return metric
    own = copy.deepcopy(metric).to(device)
    for part in own.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = lambda: False  # episodes are gathered later, see processes.py
    labels = type(own).__module__.startswith("torchmetrics.classification")

    def value(outputs: Tensor, targets: Any) -> Any:
        whole = labels and isinstance(targets, Tensor) and targets.is_floating_point() and not targets.frac().any()
        own.reset()
        own.update(outputs, targets.long() if whole else targets)
        return own.compute()

    return value


def _number(metric: Any, value: Callable[[Tensor, Any], Any], outputs: Tensor, targets: Any) -> Tensor:
    what = f"model.metric {metric_name(metric)}"
    try:
        found = value(outputs, targets)
    except Exception as error:  # whatever a metric raises
        raise SettingError(
            f"{what} cannot be computed from outputs {describe(outputs)} and targets {describe(targets)} "
            f"({_line(error)}); give another, or leave it out."
        ) from error
    numbers = torch.as_tensor(found).flatten() if isinstance(found, Tensor | int | float) else torch.zeros(0)
    if len(numbers) != 1:
        shape = describe(found) if isinstance(found, Tensor | dict) else type(found).__name__
        raise SettingError(f"{what} gives {shape}, not one number; average it (average=...), or give another.")
    return numbers[0].detach().to(outputs.device, torch.get_default_dtype())  # read later, all together


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
