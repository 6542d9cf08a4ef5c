"""The progress bar: Lightning's rich one, with what fits a terminal of 80 columns, and a line for each validation."""

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

SHOWN = ("loss", "accuracy", "mse")  # of a meta-batch, beside the bar, where they are logged


class Bar(RichProgressBar):
    """On stderr, drawn four times a second."""

    def __init__(self) -> None:
        theme = RichProgressBarTheme(metrics_text_delimiter=", ", metrics_format="#.4g")
        super().__init__(refresh_rate=4, theme=theme, console_kwargs={"stderr": True})

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The epoch, the bar, batches done and the time left."""
        return [TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Those of :data:`SHOWN`."""
        logged = trainer.progress_bar_metrics
        return {name: float(logged[f"train/{name}"]) for name in SHOWN if f"train/{name}" in logged}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a training, leave a line with the scores."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            logged = trainer.progress_bar_metrics.items()
            scores = ", ".join(f"{name} {float(value):#.4g}" for name, value in logged if name.startswith("val/"))
            rank_zero_info(f"Epoch {trainer.current_epoch}, {trainer.global_step:,} meta-steps: {scores}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the results are printed."""
        self._stop_progress()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the predictions are printed."""
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        endless = self.trainer.max_epochs in (None, -1)  # Lightning writes "Epoch 0/-2"
        return f"Epoch {current_epoch}" if endless else super()._get_train_description(current_epoch)


def with_bar(callbacks: list[Callback], config: Mapping[str, Any]) -> list[Callback]:
    """The callbacks with this bar, unless the settings of the Trainer have another or none.

    Args:
        callbacks: those of the command line.
        config: the settings of the Trainer.
    """
    own = config.get("callbacks") or []
    others = [each for each in (own if isinstance(own, list) else [own]) if isinstance(each, ProgressBar)]
    off = config.get("enable_progress_bar") is False or config.get("barebones") or sys.stderr is None
    return callbacks if off or others else [Bar(), *callbacks]
