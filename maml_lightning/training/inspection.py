"""What adaptation does to episodes, shown in TensorBoard."""

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from maml_lightning.analysis.drawing import Tile, contact_sheet
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import mapped
from maml_lightning.training import tensorboard
from maml_lightning.training.module import MAML

SHOWN = 40  # pictures of a set that are shown
CURVES = 4  # episodes that an adaptation curve is the mean of


class AdaptationMonitor(Callback):
    """Shows in TensorBoard, at each validation, what adaptation does to the first validation episodes.

    ``inspect/episodes``: support and query pictures with the labels given to them before and after adaptation, wrong
    ones in red; of regression from one number to one, the curves before and after; of other tasks nothing.
    ``inspect/adaptation``: score and loss after each inner step, to twice as many as the evaluation takes (at least
    two more). ``val/inner_update_norm``: how far adaptation moves the parameters, mean over the shown episodes.
    ``variables/inner_lr/NAME``: learned inner learning rates, a line for each tensor and step; of one rate for each
    weight their mean, and a histogram. The tab "Custom Scalars" has scores first, and "HParams" a row for the run, with
    the settings that are not the default. What cannot be shown is said in one line, and training continues.

    Args:
        episodes: how many episodes to show; 0 shows none.

    Raises:
        SettingError: ``episodes`` is below 0.
    """

    def __init__(self, episodes: int = 2) -> None:
        if episodes < 0:
            raise SettingError(f"inspection.episodes must be at least 0 (got {episodes}).")
        self.episodes = episodes
        self._first: Episode | None = None
        self._said = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from logging a score of -1 beside the settings."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._default_hp_metric = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout, and the run's row in the table of hyperparameters."""
        if not trainer.is_global_zero or not isinstance(pl_module, MAML):
            return
        names = list(pl_module.scoring.names)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                rates = [name.replace("/", ".") for name in pl_module.adaptation.learnt]
                logger.experiment.add_custom_scalars(tensorboard.layout(names, rates))
                scores_of = [f"{split}/{name}" for split in ("val", "test") for name in names or ["loss"]]
                tensorboard.add_row(logger.experiment, tensorboard.settings_of(trainer, pl_module), scores_of)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep the first episodes."""
        if batch_idx == 0 and self.episodes and trainer.is_global_zero and isinstance(pl_module, MAML):
            self._first = mapped(lambda tensor: tensor[: max(self.episodes, CURVES)], Episode.of(batch).check())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write images, figures and histograms of the first episodes."""
        first, self._first = self._first, None
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if first is None or trainer.sanity_checking or not writers or not isinstance(pl_module, MAML):
            return
        try:
            self._show(first, trainer.global_step, pl_module, writers)
        except Exception as error:  # such as memory that runs out: twice as many steps are taken as in the evaluation
            if not self._said:
                self._said = True
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                rank_zero_info(f"inspection shows nothing here ({reason}); --inspection.episodes 0 leaves it out.")

    def _show(self, first: Episode, step: int, pl_module: MAML, writers: list[Any]) -> None:
        steps = pl_module.eval_inner_steps
        outputs, losses = pl_module.evaluated(first, max(2 * steps, steps + 2))
        sheet = _episodes_sheet(first, outputs, self.episodes, steps) if _are_pictures(first, outputs[0]) else None
        curves = {"inspect/adaptation": _adaptation_figure(first, outputs, losses, pl_module)}
        if _is_curve(first, outputs[0]):
            curves["inspect/episodes"] = _regression_figure(first, outputs, self.episodes, steps)
        norms = pl_module.inner_update_norms(first)[: self.episodes]
        learned = pl_module.adaptation.learnt
        rates = {name.replace("/", "."): rate.detach().float() for name, rate in learned.items()}
        for writer in writers:
            if sheet is not None:
                writer.add_image("inspect/episodes", np.asarray(sheet), step, dataformats="HWC")
            for tag, figure in curves.items():
                writer.add_figure(tag, figure, step, close=False)
            writer.add_scalar("val/inner_update_norm", norms.mean().item(), step)
            for tag, rate in tensorboard.learned_rates(rates).items():
                writer.add_scalar(tag, rate, step)
            for name, of_weights in rates.items():
                if of_weights.dim() > 1:
                    writer.add_histogram(f"{tensorboard.RATES}/{name}", of_weights, step)


def _are_pictures(first: Episode, outputs: Tensor) -> bool:
    """Whether inputs are pictures of one class each."""
    inputs, targets = first.query_inputs, first.query_targets
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or not inputs.is_floating_point():
        return False
    labels = targets.dim() == 2 and not targets.is_floating_point() and outputs.dim() == 3 and outputs.shape[2] > 1
    return labels and inputs.dim() == 5 and inputs.shape[2] in (1, 3)


def _is_curve(first: Episode, outputs: Tensor) -> bool:
    """Whether each example is of one number, with one number as its target and its output."""
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in first):
        return False
    support, query = first.support_targets.shape[:2], first.query_targets.shape[:2]
    inputs, targets = (first.support_inputs, first.query_inputs), (first.support_targets, first.query_targets)
    return all(
        part.numel() == size.numel()
        for pair in (inputs, targets, (first.support_targets, outputs))
        for part, size in zip(pair, (support, query), strict=True)
    )


def _episodes_sheet(first: Episode, outputs: list[Tensor], episodes: int, steps: int) -> Image.Image:
    parts: list[tuple[str, list[Tile]]] = []
    for task, (inputs, targets, query, true_labels) in enumerate(zip(*first, strict=True)):
        if task == episodes:
            break
        support = [Tile(picture, str(int(label))) for picture, label in zip(inputs, targets, strict=True)]
        parts.append((f"episode {task}: support", support[:SHOWN]))
        for title, logits in (("before adaptation", outputs[0]), (f"after {steps} steps", outputs[steps])):
            predicted = zip(query, logits[task].argmax(-1).tolist(), true_labels.tolist(), strict=True)
            tiles = [
                Tile(picture, str(label), "green") if label == true else Tile(picture, f"{label}, is {true}", "red")
                for picture, label, true in predicted
            ]
            parts.append((f"episode {task}: query, {title}", tiles[:SHOWN]))
    return contact_sheet(parts)


def _adaptation_figure(first: Episode, outputs: list[Tensor], known: list[Tensor], maml: MAML) -> Figure:
    """Score and loss against inner steps; the evaluation's own number is marked."""
    steps = range(len(outputs))
    losses = maml.scoring.losses(outputs, first.query_targets, known).nanmean(0).tolist()
    curves = maml.scoring.columns(outputs, first.query_targets, known).nanmean(0).view(-1, len(outputs)).tolist()
    shown = {**dict(zip(maml.scoring.names, curves, strict=True)), "loss": losses}
    figure = Figure(figsize=(2.4 * len(shown), 2.4))
    figure.subplots_adjust(0.13, 0.2, 0.98, 0.95, wspace=0.4)  # "constrained" takes twice as long as the drawing
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        axes.plot(steps, values, marker=".")
        axes.axvline(maml.eval_inner_steps, color="grey", linestyle=":")
        axes.set(xlabel="inner steps", ylabel=name)
    return figure


def _regression_figure(first: Episode, outputs: list[Tensor], episodes: int, steps: int) -> Figure:
    """True and predicted values against inputs, a panel for each episode; TensorBoard shrinks wide figures."""
    shown = min(episodes, first.tasks)
    figure = Figure(figsize=(4, 2.8 * shown + 0.4), layout="constrained")
    support, values, query, targets, before, after = (
        part[:shown].flatten(1).cpu().numpy() for part in (*first, outputs[0], outputs[steps])
    )
    for task, axes in enumerate(figure.subplots(shown, 1, squeeze=False)[:, 0]):
        order = query[task].argsort()
        for predicted, style, label in ((targets, "-", "true"), (before, ":", "before"), (after, "--", "after")):
            axes.plot(query[task][order], predicted[task][order], style, label=label)
        axes.plot(support[task], values[task], "o", color="black", label="support")
        axes.set(title=f"episode {task}: before and after {steps} steps", xlabel="input", ylabel="target")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, columnspacing=1, handlelength=1.5)
    return figure
