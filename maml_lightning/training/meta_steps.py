"""The meta-steps of a training whose gradient is not finite: stopped at, skipped, or left to the loss scaler.

A GPU is waited for once in a meta-step, for two numbers that decide what comes next: whether the gradient is finite,
and the largest signal that a process got. All else that is known of the episodes stays on the device until it is asked
for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_lightning.engine.chunks import MetaGradient
from maml_lightning.errors import NonFiniteError
from maml_lightning.processes import rows_of_every_process
from maml_lightning.training.non_finite import describe, report_skipped
from maml_lightning.training.scores import FINITE, episode_rows

_GRADIENT = FINITE + 1  # the column of a row that says whether its batch's gradient is finite


class _Batch(NamedTuple):
    """What is kept of a batch: the numbers of its episodes, and whether their outputs and their gradient are finite."""

    numbers: Sequence[int]
    finite: Tensor
    gradient: Tensor


class MetaSteps:
    """What the meta-step that is being computed knows of its batches, and how many were skipped in this training."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []
        self._signals: list[Tensor] = []
        self.skipped = self._first = 0

    def begin(self, step: int) -> None:
        """Count skipped meta-steps from here on."""
        self._batches, self._signals, self.skipped, self._first = [], [], 0, step

    def end(self, step: int) -> None:
        """Say how many meta-steps were skipped; raise if all were."""
        report_skipped(self.skipped, step - self._first)

    def add(self, numbers: Sequence[int], result: MetaGradient, signal: Tensor | None, module: Any) -> None:
        """Note a batch.

        Args:
            numbers: of its episodes.
            result: its meta-gradient.
            signal: the largest of several processes, a scalar.
            module: MAML; with a loss scaler, which multiplies the gradient later, it is noted whether it is finite now.
        """
        finite = result.predictions.isfinite().flatten(1).all(1)
        gradient = finite.new_ones(())
        if _scaler(module) is not None:
            gradient = torch.nn.utils.get_total_norm([*result.gradient.values(), *result.rates.values()]).isfinite()
        self._batches.append(_Batch(numbers, finite, gradient))
        self._signals += [] if signal is None else [signal]

    def check(self, module: Any) -> Tensor:
        """The norm of the gradient that the optimizer is about to take.

        Where it is not finite, the step is skipped: without gradients the optimizer changes nothing, its moments
        included. An overflow that a loss scaler caused is left to it: it skips the step, and lowers its scale.

        Raises:
            NonFiniteError: it is not, and ``non_finite`` is stop.
        """
        norm = torch.nn.utils.get_total_norm([value.grad for value in module.parameters() if value.grad is not None])
        batches, self._batches, signals, self._signals = self._batches, [], self._signals, []
        finite, *agreed = torch.stack([norm.isfinite().to(norm.dtype), *signals]).tolist()
        module.agreed_signal = int(max(agreed, default=module.signal))
        if finite:
            return norm
        own = [episode_rows(b.numbers, b.finite, b.gradient.expand(len(b.finite))) for b in batches]
        rows = rows_of_every_process(torch.cat(own))  # all are here: they share the gradient
        scaler = _scaler(module)
        by_scale = scaler is not None and bool(rows[:, [FINITE, _GRADIENT]].all()) and scaler.get_scale() > 1
        if module.non_finite == "stop" and not by_scale:
            raise NonFiniteError(
                describe(f"The meta-gradient of meta-step {module.global_step}", "train", rows, module)
            )
        self.skipped += 1
        for value in module.parameters() if not by_scale else ():
            value.grad = None
        return norm


def _scaler(module: Any) -> Any:
    """The loss scaler of 16-mixed, if there is one."""
    return getattr(module.trainer.precision_plugin, "scaler", None)
