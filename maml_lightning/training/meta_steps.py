"""The meta-steps of a training whose gradient is not finite: stopped at, skipped, or left to the loss scaler.

A GPU is waited for once in a meta-step, when it has the gradient: its norm and all that is logged are read together.
What else is known of the episodes stays on the device until a gradient is not finite.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from torch import Tensor

from maml_lightning.engine.chunks import MetaGradient
from maml_lightning.errors import NonFiniteError
from maml_lightning.processes import rows_of_every_process
from maml_lightning.training.non_finite import describe, report_skipped
from maml_lightning.training.scores import FINITE, episode_rows

_GRADIENT = FINITE + 1  # the column of a row that says whether its batch's gradient is finite


class _Batch(NamedTuple):
    """What is kept of a batch: the numbers of its episodes, and whether their outputs and their gradient are finite.

    Beside it ``shared``, what every process logs, and the signal that it got, ``[processes, names + 1]``.
    """

    numbers: Sequence[int]
    finite: Tensor
    gradient: Tensor
    names: list[str]
    shared: Tensor


class MetaSteps(Callback):
    """What the meta-step that is being computed knows of its batches, and how many were skipped in this training.

    A callback, so that a subclass of MAML has the hooks of the same names to itself.
    """

    def __init__(self) -> None:
        self._batches: list[_Batch] = []
        self.skipped = self._first = 0

    def join(self, trainer: Any) -> None:
        """Be one of the trainer's callbacks."""
        if self not in trainer.callbacks:
            trainer.callbacks.append(self)
            self.on_train_start(trainer, trainer.lightning_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count skipped meta-steps from here on."""
        self._batches, self.skipped, self._first = [], 0, trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how many meta-steps were skipped; raise if all were."""
        report_skipped(self.skipped, trainer.global_step - self._first)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log, and stop at a gradient that is not finite, or skip the step, as ``non_finite`` says."""
        before = self.skipped
        norm, means = self.check(pl_module)
        pl_module.log_dict(means, prog_bar=True)
        pl_module.log("train/gradient_norm", norm)
        if self.skipped > before:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def add(self, numbers: Sequence[int], result: MetaGradient, names: list[str], shared: Tensor, module: Any) -> None:
        """Note a batch.

        Args:
            numbers: of its episodes.
            result: its meta-gradient.
            names: of what is logged of it.
            shared: its means in every process, and the signal that each got, ``[processes, names + 1]``.
            module: MAML; with a loss scaler, which multiplies the gradient later, it is noted whether it is finite now.
        """
        finite = result.predictions.isfinite().flatten(1).all(1)
        gradient = finite.new_ones(())
        if _scaler(module) is not None:
            gradient = torch.nn.utils.get_total_norm([*result.gradient.values(), *result.rates.values()]).isfinite()
        self._batches.append(_Batch(numbers, finite, gradient, names, shared))

    def check(self, module: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The norm of the gradient that the optimizer is about to take, and the last batch's means, on the CPU.

        Where it is not finite, the step is skipped: without gradients the optimizer changes nothing, its moments
        included. An overflow that a loss scaler caused is left to it: it skips the step, and lowers its scale.

        Raises:
            NonFiniteError: it is not, and ``non_finite`` is stop.
        """
        norm = torch.nn.utils.get_total_norm([value.grad for value in module.parameters() if value.grad is not None])
        batches, self._batches = self._batches, []
        if not batches:  # of a training_step of one's own
            if module.non_finite == "stop" and not norm.isfinite():
                raise NonFiniteError(f"The gradient of step {module.global_step} is not finite; lower model.inner_lr.")
            return norm, {}
        last = batches[-1]
        signal = torch.stack([batch.shared[:, -1].max() for batch in batches]).max()
        wide = torch.promote_types(norm.dtype, last.shared.dtype)
        read = torch.cat([norm[None].to(wide), signal[None].to(wide), last.shared.mean(0)[:-1].to(wide)]).tolist()
        module.agreed_signal = int(read[1]) if len(last.shared) > 1 else module.signal
        means = dict(zip(last.names, torch.tensor(read[2:], dtype=last.shared.dtype), strict=True))
        norm = torch.tensor(read[0], dtype=norm.dtype)
        if norm.isfinite():
            return norm, means
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
        return norm, means


def _scaler(module: Any) -> Any:
    """The loss scaler of 16-mixed, if there is one."""
    return getattr(module.trainer.precision_plugin, "scaler", None)
