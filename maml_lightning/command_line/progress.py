"""The progress bar: one line with a few numbers, and a line that stays for each validation of a training."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

SHOWN = ("train/loss", "train/accuracy", "train/mse")  # beside the bar, where they are logged


class OneLine(ProgressBar):
    """A bar that fits a terminal of 80 columns, on stderr; without a terminal, only the lines of validations.

    The bar goes when the run ends. `RichProgressBar` of Lightning breaks its numbers into several lines instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._bar = TaskID(0)

    def disable(self) -> None:
        """Show nothing, as in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show an epoch's start: its first meta-step takes longer than others."""
        self._show(_epoch(trainer), 0, self.total_train_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the epoch's batches and the meta-batch's scores."""
        scores = {name: value for name, value in trainer.progress_bar_metrics.items() if name in SHOWN}
        self._show(_epoch(trainer), args[-1] + 1, self.total_train_batches, _text(scores))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the batches of a validation."""
        self.has_dataloader_changed(args[3] if len(args) > 3 else 0)
        name = "Checking" if trainer.sanity_checking else "Validating"
        self._show(name, args[2] + 1, self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the batches of a test."""
        self.has_dataloader_changed(args[3] if len(args) > 3 else 0)
        self._show("Testing", args[2] + 1, self.total_test_batches_current_dataloader)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the batches of predictions; pictures are predicted in one."""
        self.has_dataloader_changed(args[3] if len(args) > 3 else 0)
        if (total := self.total_predict_batches_current_dataloader) > 1:
            self._show("Predicting", args[2] + 1, total)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a line with the scores, of a training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._enabled:
            scores = {name: value for name, value in trainer.progress_bar_metrics.items() if name.startswith("val/")}
            rank_zero_info(f"{_epoch(trainer)}, {trainer.global_step:,} meta-steps: {_text(scores)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the bar."""
        self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar before the results."""
        self._stop()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar before the results."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar before the error."""
        self._stop()

    def _show(self, name: str, done: int, total: float, scores: str = "") -> None:
        if not self._enabled:
            return
        known = total if math.isfinite(total) else None
        if self._progress is None:
            console = Console(stderr=True)
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[scores]}", table_column=Column(no_wrap=True)),
                console=console,
                disable=not console.is_terminal,
                transient=True,
                refresh_per_second=4,
            )
            self._bar = self._progress.add_task(name, total=known, completed=done, scores=scores)
            self._progress.start()
        self._progress.update(self._bar, description=name, completed=done, total=known, scores=scores)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _epoch(trainer: Trainer) -> str:
    last = trainer.max_epochs
    return f"Epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")


def _text(scores: dict[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):#.4g}" for name, value in scores.items())


def with_bar(callbacks: list[Callback], config: Mapping[str, Any]) -> list[Callback]:
    """The callbacks with this bar, unless the settings of the Trainer have another or none.

    Args:
        callbacks: those of the command line.
        config: the settings of the Trainer.
    """
    own = config.get("callbacks") or []
    others = [each for each in (own if isinstance(own, list) else [own]) if isinstance(each, ProgressBar)]
    off = config.get("enable_progress_bar") is False or config.get("barebones")
    return callbacks if off or others else [OneLine(), *callbacks]  # gone before others print
