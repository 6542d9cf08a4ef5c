"""What a run leaves behind for people: what it cost, and the test report."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maml_lightning.memory import peak_bytes
from maml_lightning.module import MAML

DIGITS = 7  # an episode's score is a float32
WARM_UP = 5  # meta-steps at the start of a run that measure settings, trace and compile


class Cost(Callback):
    """Logs ``train/seconds_per_step`` and ``train/peak_memory_mb`` after each training epoch; of ranks the largest.

    Seconds are the mean wall time of a meta-step of the epoch, the drawing of its episodes included; validation,
    checkpoints and the run's first ``WARM_UP`` meta-steps are not. Memory (MB of 10^6 bytes) is the most so far: on
    CUDA what tensors held since training began, else what was resident of the whole process since it began.
    """

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None  # the clock and the meta-step when it was started
        self._warm = self._steps = 0
        self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._begun, self._seconds, self._steps = None, 0.0, 0
        self._warm = trainer.global_step + WARM_UP
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock, unless it runs already: over all steps at once a device need not be waited for at each."""
        if self._begun is None and trainer.global_step >= self._warm:
            self._begun = _now(trainer), trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the next meta-step starts it again."""
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and log."""
        self._stop(trainer)
        costs = {"train/peak_memory_mb": peak_bytes(pl_module.device) / 1e6}
        if self._steps:
            costs["train/seconds_per_step"] = self._seconds / self._steps
        pl_module.log_dict(costs, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self._seconds, self._steps = 0.0, 0

    def _stop(self, trainer: Trainer) -> None:
        if self._begun is not None:
            begun, step = self._begun
            self._seconds += _now(trainer) - begun
            self._steps += trainer.global_step - step
            self._begun = None


def _now(trainer: Trainer) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


def test_results(scores: Tensor, name: str) -> dict:
    """Mean and 95 % interval over episodes.

    Args:
        scores: ``[episodes, steps + 1]``, one accuracy (or mean squared error) per episode and inner step.
        name: what the scores are, ``accuracy`` or ``mse``.

    Returns:
        ``{name, ci95, episodes, inner_steps, name_per_step}``; ``ci95`` is the half-width 1.96 s / sqrt(episodes).
    """
    final = scores[:, -1]
    return {
        name: round(final.mean().item(), DIGITS),
        "ci95": round(1.96 * final.std().item() / len(final) ** 0.5, DIGITS) if len(final) > 1 else None,
        "episodes": len(final),
        "inner_steps": scores.shape[1] - 1,
        f"{name}_per_step": [round(score, DIGITS) for score in scores.mean(0).tolist()],
    }


class TestReport(Callback):
    """Writes ``test_results.json`` into the run's log folder and prints its headline."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, in the first process."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # which all processes ask for together
        if not trainer.is_global_zero or not isinstance(pl_module, MAML) or pl_module.test_scores is None:
            return
        scores, name = pl_module.test_scores, pl_module.score_name
        results = test_results(scores.cpu(), name)
        data = getattr(trainer, "datamodule", None)
        task = {setting: getattr(data, setting, None) for setting in ("ways", "shots", "query_shots")}
        results = {**results, **task, "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path)}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "test_results.json"
        file.write_text(json.dumps(results, indent=2) + "\n")
        scale, unit = (100, " %") if name == "accuracy" else (1, "")
        interval = "" if results["ci95"] is None else f" ± {scale * results['ci95']:.2f}"
        rank_zero_info(
            f"Test {name} after {results['inner_steps']} inner steps: {scale * results[name]:.2f}{interval}{unit} "
            f"over {results['episodes']} episodes ({file})"
        )


class PredictionReport(Callback):
    """Lets data that asks for it (`SupportQueryDataModule`) write what was predicted."""

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Hand over the probabilities of the one task."""
        report = getattr(getattr(trainer, "datamodule", None), "report", None)
        if report is not None and trainer.is_global_zero:
            report(outputs[0])
