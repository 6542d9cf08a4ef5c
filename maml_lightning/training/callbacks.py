"""What a run leaves behind for people: what it cost, what adaptation does, and the test report."""

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from maml_lightning.analysis.drawing import Tile, contact_sheet
from maml_lightning.analysis.tables import csv_bytes, write_file
from maml_lightning.engine.memory import peak_bytes
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.processes import every_process
from maml_lightning.training.module import MAML, episode_scores, ignored_target

warnings.filterwarnings("ignore", "Couldn't infer the batch indices")  # of loaders without a sampler: they are counted

DIGITS = 7  # an episode's score is a float32
SHOWN = 40  # pictures of a set that are shown
CURVES = 4  # episodes that an adaptation curve is the mean of
WARM_UP = 5  # meta-steps at the start of a run that measure settings, trace and compile


class Cost(Callback):
    """Logs what a run costs after each epoch.

    ``train/seconds_per_step``, ``train/tasks_per_second``, ``train/peak_memory_mb``, and ``train/minutes`` since
    training began, validations included, the time between an interruption and a resumption not.

    Of several processes the slowest and the largest. Seconds are the mean wall time of a meta-step of the epoch, the
    drawing of its episodes included; validation, checkpoints and the run's first ``WARM_UP`` meta-steps are not.
    Memory (MB of 10^6 bytes) is the most so far: on CUDA what tensors held since training began, else what was
    resident of the whole process since it began.
    """

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None  # the clock and the meta-step when it was started
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
        """Go on from there."""
        self._earlier = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._started = time.perf_counter()
        self._begun, self._seconds, self._steps, self._peak = None, 0.0, 0, 0
        self._warm = trainer.global_step + WARM_UP
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs already: over all steps at once a device need not be waited for at each."""
        self._tasks = len(batch[0]) * trainer.world_size * trainer.accumulate_grad_batches
        if self._begun is None and trainer.global_step >= self._warm:
            self._begun = _now(trainer), trainer.global_step

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
        memory, minutes, seconds = every_process(local).amax(0)
        costs = {"train/peak_memory_mb": memory, "train/minutes": minutes}
        if self._steps:
            costs |= {"train/seconds_per_step": seconds, "train/tasks_per_second": self._tasks / seconds}
        pl_module.log_dict(costs, on_step=False, on_epoch=True)
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
    """Prints a test's headline and writes ``test_results.json`` into the run's log folder.

    Episodes whose networks' outputs are not finite (with ``non_finite`` skip), or none of whose query targets counts,
    are in none of its figures; where there are any, ``skipped`` is their number.
    """

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
        left = ""
        if pl_module.skipped_episodes:
            results["skipped"], left = pl_module.skipped_episodes, f", {pl_module.skipped_episodes} left out"
        file = folder / "test_results.json"
        scale, unit = (100, " %") if name == "accuracy" else (1, "")
        interval = "" if results["ci95"] is None else f" ± {scale * results['ci95']:.2f}"
        rank_zero_info(
            f"Test {name} after {results['inner_steps']} inner steps: {scale * results[name]:.2f}{interval}{unit} "
            f"over {results['episodes']} episodes{left} ({file})"
        )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        plain = {key: value for key, value in pl_module.hparams.items() if isinstance(value, str | int | float)}
        settings = {key: value for key, value in plain.items() if not key.startswith("_")}  # Lightning's own
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # A folder of its own: TensorBoard takes the first settings of a run, and Lightning has written some.
                logger.experiment.add_hparams(
                    {key: value for key, value in {**settings, **task}.items() if value is not None},
                    {f"test/{name}": results[name]},
                    run_name="hparams",
                )


class Inspection(Callback):
    """Shows in TensorBoard, at each validation, what adaptation does to the first validation episodes.

    ``inspect/episodes``: support and query pictures with the labels given to them before and after adaptation, wrong
    ones in red; of regression from one number to one, the curves before and after. ``inspect/adaptation``: score and
    loss after each inner step, to twice as many as the evaluation takes (at least two more). ``val/inner_update_norm``:
    how far adaptation moves the parameters, mean over the pictured episodes. ``inner_lr/NAME``: histograms of learnt
    inner rates.

    Args:
        episodes: how many episodes are pictured; 0 shows nothing.

    Raises:
        SettingError: ``episodes`` is below 0.
    """

    def __init__(self, episodes: int = 2) -> None:
        if episodes < 0:
            raise SettingError(f"inspection.episodes must be at least 0 (got {episodes}).")
        self.episodes = episodes
        self._first: Episode | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep the first episodes."""
        if batch_idx == 0 and self.episodes and trainer.is_global_zero:
            self._first = Episode(*(part[: max(self.episodes, CURVES)] for part in batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show."""
        first, self._first = self._first, None
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if first is None or trainer.sanity_checking or not writers or not isinstance(pl_module, MAML):
            return
        steps = pl_module.eval_inner_steps
        step, most = trainer.global_step, max(2 * steps, steps + 2)
        outputs = pl_module.trajectory(first, most)
        pictures = first.query_inputs.dim() == 5 and first.query_inputs.shape[2] in (1, 3)
        sheet = _episodes_sheet(first, outputs, self.episodes, steps) if pictures else None
        curves = {"inspect/adaptation": _adaptation_figure(first, outputs, pl_module)}
        if first.query_targets.is_floating_point() and first.query_inputs[0, 0].numel() == 1:
            curves["inspect/episodes"] = _regression_figure(first, outputs, self.episodes, steps)
        norms = pl_module.inner_update_norms(first)[: self.episodes]
        for writer in writers:
            if sheet is not None:
                writer.add_image("inspect/episodes", np.asarray(sheet), step, dataformats="HWC")
            for tag, figure in curves.items():
                writer.add_figure(tag, figure, step, close=False)
            writer.add_scalar("val/inner_update_norm", norms.mean().item(), step)
            for name, rate in pl_module.adaptation.learnt.items():
                writer.add_histogram(f"inner_lr/{name}", rate.detach().float(), step)


def _episodes_sheet(first: Episode, outputs: list[Tensor], episodes: int, steps: int) -> Image.Image:
    parts: list[tuple[str, list[Tile]]] = []
    for task, (inputs, targets, query, wanted) in enumerate(zip(*first, strict=True)):
        if task == episodes:
            break
        support = [Tile(picture, str(int(label))) for picture, label in zip(inputs, targets, strict=True)]
        parts.append((f"episode {task}: support", support[:SHOWN]))
        for title, logits in (("before adaptation", outputs[0]), (f"after {steps} steps", outputs[steps])):
            told = zip(query, logits[task].argmax(-1).tolist(), wanted.tolist(), strict=True)
            tiles = [
                Tile(
                    picture, str(label) if label == true else f"{label}, is {true}", "green" if label == true else "red"
                )
                for picture, label, true in told
            ]
            parts.append((f"episode {task}: query, {title}", tiles[:SHOWN]))
    return contact_sheet(parts)


def _adaptation_figure(first: Episode, outputs: list[Tensor], maml: MAML) -> Figure:
    """Score and loss against inner steps; the evaluation's own number is marked."""
    steps = range(len(outputs))
    scores = episode_scores(outputs, first.query_targets, ignored_target(maml.loss)).nanmean(0).tolist()
    losses = [maml.loss(output.flatten(0, 1), first.query_targets.flatten(0, 1)).item() for output in outputs]
    figure = Figure(figsize=(6, 3))
    figure.subplots_adjust(0.1, 0.17, 0.98, 0.95, wspace=0.25)  # "constrained" takes twice as long as the drawing
    for axes, values, name in zip(figure.subplots(1, 2), (scores, losses), (maml.score_name, "loss"), strict=True):
        axes.plot(steps, values, marker=".")
        axes.axvline(maml.eval_inner_steps, color="grey", linestyle=":")
        axes.set(xlabel="inner steps", ylabel=name)
    return figure


def _regression_figure(first: Episode, outputs: list[Tensor], episodes: int, steps: int) -> Figure:
    """True and predicted values against inputs, a panel for each episode."""
    shown = min(episodes, first.tasks)
    figure = Figure(figsize=(4 * shown, 3.5), layout="constrained")
    support, values, query, wanted, before, after = (
        part[:shown].flatten(1).cpu().numpy() for part in (*first, outputs[0], outputs[steps])
    )
    for task, axes in enumerate(figure.subplots(1, shown, squeeze=False)[0]):
        order = query[task].argsort()
        for predicted, style, label in ((wanted, "-", "true"), (before, ":", "before"), (after, "--", "after")):
            axes.plot(query[task][order], predicted[task][order], style, label=label)
        axes.plot(support[task], values[task], "o", color="black", label="support")
        axes.set(title=f"episode {task}: before and after {steps} steps", xlabel="input", ylabel="target")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


class Predicted(NamedTuple):
    """What was predicted in one episode.

    Args:
        episode: its number in the split, or in the order of the predictions where the data do not tell.
        targets: ``[N*Q]`` or ``[Q, D]``.
        outputs: class probabilities ``[N*Q, N]``, or of regression the network's outputs ``[Q, D]``.
    """

    episode: int
    targets: Tensor
    outputs: Tensor


class PredictionReport(BasePredictionWriter):
    """Writes what was predicted of episodes into the run's log folder, as ``predictions.csv``, a row for each query.

    Columns are ``episode, query, label, predicted, probability_0 …``; of regression ``episode, query, target_0 …,
    predicted_0 …``. Episodes come in their order, whatever the number of processes. Where outputs are not finite,
    ``predicted`` is empty. Data that has a ``report`` method (`SupportQueryDataModule`) writes itself.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._predicted: list[Predicted] = []
        self._numbered = True  # whether the data tell episodes' numbers

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._predicted, self._numbered = [], True

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the episodes' predictions, or hand over those of the one task."""
        report = getattr(getattr(trainer, "datamodule", None), "report", None)
        if report is not None:
            if trainer.is_global_zero:
                report(prediction[0])
        elif isinstance(pl_module, MAML):
            targets = Episode(*batch).query_targets
            numbers = list(batch_indices or ())
            if len(numbers) != len(targets):
                self._numbered, numbers = False, [0] * len(targets)
            self._predicted += map(Predicted, numbers, targets.cpu(), prediction.float().cpu())

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring together what all processes predicted, and write it in the first."""
        if not isinstance(pl_module, MAML) or hasattr(getattr(trainer, "datamodule", None), "report"):
            return
        shares = [(self._numbered, self._predicted)]
        if trainer.world_size > 1:  # all processes are here
            shares = [(True, [])] * trainer.world_size
            torch.distributed.all_gather_object(shares, (self._numbered, self._predicted))
        folder, self._predicted = Path(trainer.log_dir or trainer.default_root_dir), []  # log_dir asks them all as well
        if not trainer.is_global_zero:
            return
        predicted = [each for _, share in shares for each in share]
        if all(numbered for numbered, _ in shares):  # an episode that several processes predicted counts once
            by_number = {each.episode: each for each in predicted}
            predicted = [by_number[number] for number in sorted(by_number)]
        else:
            predicted = [each._replace(episode=number) for number, each in enumerate(predicted)]
        rows, broken = prediction_rows(predicted)
        file = write_file(folder / "predictions.csv", csv_bytes(rows))
        left = f"; of {broken} the outputs are not finite, nothing is predicted there" if broken else ""
        rank_zero_info(f"Predictions of {len(predicted)} episodes, {len(rows) - 1} queries{left} ({file})")


def prediction_rows(predicted: Sequence[Predicted]) -> tuple[list[list[object]], int]:
    """The table of predictions with its header, and of how many queries the outputs are not finite.

    Args:
        predicted: of episodes that are all classification or all regression.
    """
    regression = any(each.targets.is_floating_point() for each in predicted)
    rows: list[list[object]] = []
    broken = width = 0
    for episode, targets, outputs in predicted:
        outputs, finite = (
            outputs.reshape(len(targets), -1),
            outputs.reshape(len(targets), -1).isfinite().all(1).tolist(),
        )
        targets = targets.reshape(len(targets), -1)
        width = max(width, outputs.shape[1])
        broken += finite.count(False)
        labels = outputs.argmax(1).tolist()
        for query, (target, output) in enumerate(zip(targets.tolist(), outputs.tolist(), strict=True)):
            if regression:
                told = [f"{value:.7g}" for value in target] + [
                    f"{value:.7g}" if finite[query] else "" for value in output
                ]
            else:
                told = [target[0], labels[query] if finite[query] else "", *(f"{value:.6f}" for value in output)]
            rows.append([episode, query, *told])
    if regression:
        header = [f"{what}_{index}" for what in ("target", "predicted") for index in range(width)]
    else:
        header = ["label", "predicted", *(f"probability_{index}" for index in range(width))]
    rows = [[*row, *[""] * (2 + len(header) - len(row))] for row in rows]  # an episode may have fewer classes
    return [["episode", "query", *header], *rows], broken
