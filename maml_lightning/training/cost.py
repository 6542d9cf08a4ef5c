"""What a run costs: seconds per meta-step, minutes and memory."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from maml_lightning.devices import synchronize
from maml_lightning.engine.memory import peak_bytes
from maml_lightning.processes import every_process, reduce_logged
from maml_lightning.structures import leaves

WARM_UP = 5  # meta-steps at the start of a run that measure settings, trace and compile


class CostMonitor(Callback):
    """Logs time and memory after each epoch.

    ``train/seconds_per_step``, ``train/tasks_per_second``, ``train/peak_memory_mb``, and ``train/minutes`` since
    training began, validations included, the time between an interruption and a resumption not.

    Of several processes the slowest and the largest. Seconds are the mean wall time of a meta-step of the epoch, the
    drawing of its episodes included; validation, checkpoints and the run's first ``WARM_UP`` meta-steps are not.
    Memory (MB of 10^6 bytes) is the most so far: on CUDA what tensors held since training began, else what was
    resident of the whole process since it began.
    """

    state_key = "Cost"  # as in checkpoints of earlier releases

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None  # the clock and the meta-step when it started
        self._warm = self._steps = self._tasks = self._peak = 0
        self._seconds = self._earlier = 0.0  # of the epoch, and of the parts of the run before this one
        self._started: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self._earlier, self._started = 0.0, None

    def state_dict(self) -> dict[str, float]:
        """How long the run has trained, in seconds."""
        return {"seconds": self._earlier + (0.0 if self._started is None else time.perf_counter() - self._started)}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from there."""
        self._earlier = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the run."""
        self._started = time.perf_counter()
        self._begun, self._seconds, self._steps, self._peak = None, 0.0, 0, 0
        self._warm = trainer.global_step + WARM_UP
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs already: over all steps at once a device need not be waited for at each."""
        self._tasks = len(leaves(batch)[0]) * trainer.world_size * trainer.accumulate_grad_batches
        if self._begun is None and trainer.global_step >= self._warm:
            self._begun = now(trainer.strategy.root_device), trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the next meta-step starts it again."""
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and log."""
        self._stop(trainer)
        self._peak = max(self._peak, peak_bytes(pl_module.device))  # Linux takes it back by some pages at times
        seconds = self._seconds / max(self._steps, 1)
        local = torch.tensor([self._peak / 1e6, self.state_dict()["seconds"] / 60, seconds], device=pl_module.device)
        # Of all processes the most, asked for by all of them here: see MAML.training_step.
        reduce_logged(trainer)
        memory, minutes, seconds = every_process(local).amax(0)
        costs = {"train/peak_memory_mb": memory, "train/minutes": minutes}
        if self._steps:
            costs |= {"train/seconds_per_step": seconds, "train/tasks_per_second": self._tasks / seconds}
        pl_module.log_dict(costs, on_step=False, on_epoch=True)
        self._seconds, self._steps = 0.0, 0

    def _stop(self, trainer: Trainer) -> None:
        if self._begun is not None:
            begun, step = self._begun
            self._seconds += now(trainer.strategy.root_device) - begun
            self._steps += trainer.global_step - step
            self._begun = None


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()
