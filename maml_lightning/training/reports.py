"""What is left of a test and of predictions: ``test_results.json`` and ``predictions.csv`` in the run's log folder."""

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from maml_lightning.analysis.tables import csv_bytes, write_file
from maml_lightning.engine.trials import same_random_numbers
from maml_lightning.episodes import Episode
from maml_lightning.files import short
from maml_lightning.structures import call, first_task, mapped, plain, tensor_of
from maml_lightning.training import tensorboard
from maml_lightning.training.confidence import task_outputs
from maml_lightning.training.ensembles import Ensemble
from maml_lightning.training.module import MAML
from maml_lightning.training.scores import Score

warnings.filterwarnings("ignore", "Couldn't infer the batch indices")  # of loaders without a sampler: they are counted

DIGITS = 7  # an episode's score is a float32


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


def metric_results(scores: Tensor, name: str) -> dict:
    """Mean and 95 % interval of a further metric, over the episodes that it is defined of.

    Args:
        scores: ``[episodes, steps + 1]``; NaN where it is not defined.
        name: what it is logged as.

    Returns:
        ``{name, name_ci95, name_per_step}``, and ``name_episodes`` where it is not defined of all.
    """
    defined = scores[~scores.isnan().any(1)]
    if not len(defined):
        return {name: None, f"{name}_episodes": 0}
    found = test_results(defined, name)
    fewer = {f"{name}_episodes": len(defined)} if len(defined) < len(scores) else {}
    return {name: found[name], f"{name}_ci95": found["ci95"], f"{name}_per_step": found[f"{name}_per_step"], **fewer}


def is_transductive(maml: MAML, episode: Episode) -> bool | None:
    """Whether predictions on a query depend on the other queries of its episode.

    A copy that is adapted to the first task gets all queries, then the first of them alone.

    Args:
        maml: the module.
        episode: of at least one task.

    Returns:
        None where it cannot be tried, as of inputs that are of the task as a whole.
    """
    support, targets, queries, _ = (first_task(part) for part in Episode(*map(plain, episode)))
    try:
        with same_random_numbers(maml.device), torch.no_grad():
            adapted = maml.adapt(support, targets, steps=0).eval()
            together = tensor_of(call(adapted, mapped(torch.clone, queries)))[0].float()
            alone = tensor_of(call(adapted, mapped(lambda tensor: tensor[:1].clone(), queries)))[0].float()
    except Exception:  # whatever a network raises that does not take one query
        return None
    tolerance = torch.finfo(next(maml.parameters()).dtype).eps ** 0.5 * together.abs().max().item()
    return not torch.allclose(together, alone, rtol=0, atol=tolerance, equal_nan=True)


def _networks(module: LightningModule) -> list[MAML]:
    networks = module.networks if isinstance(module, Ensemble) else [module]
    return [network for network in networks if isinstance(network, MAML)]


def _common(values: Iterable[str]) -> str | None:
    """The one value of all, None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


class TestReport(Callback):
    """Prints a test's headline and writes ``test_results.json`` into the run's log folder.

    Both say under which protocol: ``ways``, ``shots``, ``query_shots``, ``query_layout``, ``query_statistics``,
    ``head``, and ``transductive``: whether predictions depend on the other queries, as tried on the first episode. With
    ``eval_rotations`` that is said, too.

    Episodes whose networks' outputs are not finite (with ``non_finite`` skip), or none of whose query targets counts,
    are in none of its figures; where there are any, ``skipped`` is their number. Of an ensemble, ``ensemble`` lists its
    checkpoints.
    """

    _transductive: bool | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._transductive = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Try on the first episode whether predictions depend on the other queries."""
        if batch_idx == 0 and trainer.is_global_zero:
            tried = [is_transductive(network, Episode.of(batch)) for network in _networks(pl_module)]
            self._transductive = None if None in tried else any(tried)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print, in the first process."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # which all processes ask for together
        if not trainer.is_global_zero or not isinstance(pl_module, MAML | Ensemble) or not pl_module.test_scores:
            return
        (name, scores), *others = pl_module.test_scores.items()
        results = test_results(scores, name)
        for metric, values in others:
            results |= metric_results(values, metric)
        data = getattr(trainer, "datamodule", None)
        task = {setting: getattr(data, setting, None) for setting in ("ways", "shots", "query_shots")}
        protocol = {
            "query_layout": getattr(data, "query_layout", "balanced"),
            "query_statistics": _common(network.query_statistics for network in _networks(pl_module)),
            "head": _common(network.head for network in _networks(pl_module)),
            "transductive": self._transductive,
        }
        protocol |= {"eval_rotations": True} if getattr(data, "eval_rotations", False) else {}
        checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        results = {**results, **task, **protocol, "checkpoint": checkpoint}
        left = of = ""
        if isinstance(pl_module, Ensemble):
            results["ensemble"], of = pl_module.names, f" of an ensemble of {len(pl_module.names)} networks"
        if pl_module.skipped_episodes:
            results["skipped"], left = pl_module.skipped_episodes, f", {pl_module.skipped_episodes} left out"
        file = folder / "test_results.json"
        steps = results["inner_steps"]
        scale, unit = (100, " %") if name == "accuracy" else (1, "")
        interval = "" if results["ci95"] is None else f" ± {scale * results['ci95']:.2f}"
        left += "".join(f"; {metric} {results[metric]}" for metric, _ in others)
        said = (f"{words}; " if (words := protocol_text(results)) else "") + short(file)
        rank_zero_info(
            f"Test {name}{of} after {steps} inner step{'s' * (steps != 1)}: "
            f"{scale * results[name]:.2f}{interval}{unit} over {results['episodes']} episodes{left} ({said})"
        )
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        tested = {f"test/{each}": results[each] for each in pl_module.test_scores if results[each] is not None}
        self._show(trainer, pl_module, tested)

    def _show(self, trainer: Trainer, module: LightningModule, tested: dict[str, float]) -> None:
        """Write the scores into TensorBoard's table of hyperparameters: the row of the run that trained the network."""
        logs = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not logs or not isinstance(module, MAML):
            return
        trained = tensorboard.folder_of_training(trainer.ckpt_path)
        for folder in dict.fromkeys(map(str, [trained] if trained else logs)):
            try:
                with SummaryWriter(folder, filename_suffix=".test") as writer:
                    tensorboard.add_row(writer, tensorboard.settings_of(trainer, module), list(tested))
                    for tag, value in tested.items():
                        writer.add_scalar(tag, value, trainer.global_step)
            except OSError as error:
                rank_zero_info(f"TensorBoard does not get the test's figures: {folder} cannot be written ({error}).")


def protocol_text(results: dict) -> str:
    """The protocol of a test in words: ``5-way 1-shot, 15 queries per class, transductive``."""
    ways, shots, queries = (results[key] for key in ("ways", "shots", "query_shots"))
    words = [" ".join([f"{ways}-way"] * bool(ways) + [f"{shots}-shot"] * bool(shots))]
    if queries:
        of = (
            "per class" if results["query_layout"] == "balanced" else f"per class on average, {results['query_layout']}"
        )
        words.append(f"{queries} {'query' if queries == 1 else 'queries'} {of if ways else 'per episode'}")
    if results.get("eval_rotations"):
        words.append("each class rotated at random")
    if results["transductive"] is not None:
        words.append("transductive" if results["transductive"] else "each query by itself")
    return ", ".join(filter(None, words))


class Predicted(NamedTuple):
    """What was predicted in one episode.

    Args:
        episode: its number in the split, or in the order of the predictions where the data has none.
        targets: ``[N*Q]`` or ``[Q, D]``.
        outputs: class probabilities ``[N*Q, N]``, or of regression the network's outputs ``[Q, D]``.
    """

    episode: int
    targets: Any
    outputs: Tensor


class PredictionReport(BasePredictionWriter):
    """Writes what was predicted of episodes into the run's log folder, as ``predictions.csv``, a row for each query.

    Columns are ``episode, query, label, predicted, probability_0 …`` (``output_0`` of one logit); of regression and
    several labels ``episode, query, target_0 …, predicted_0 …``. Episodes come in their order, whatever the number of
    processes. Where outputs are not finite, ``predicted`` is empty. Where queries have more than a row of outputs or
    targets, such as pixels, nothing is written. Data that has a ``report`` method (`SupportQueryDataModule`) writes
    itself.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._predicted: list[Predicted] = []
        self._numbered = self._rows = True  # whether the data has episodes' numbers, and a row for each query

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier predictions."""
        self._predicted, self._numbered, self._rows = [], True, True

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
                outputs = task_outputs(pl_module, batch) if isinstance(pl_module, MAML) else None
                report(prediction[0]) if outputs is None else report(*outputs)
        elif isinstance(pl_module, MAML):
            targets = Episode.of(batch).query_targets
            if not isinstance(targets, Tensor) or targets.dim() > 3 or prediction.dim() > 3:
                self._rows = False
                return
            numbers = list(batch_indices or ())
            if len(numbers) != len(targets):
                self._numbered, numbers = False, [0] * len(targets)
            self._predicted += map(Predicted, numbers, targets.cpu(), prediction.float().cpu())

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the predictions of all processes, and write them in the first."""
        if not isinstance(pl_module, MAML) or hasattr(getattr(trainer, "datamodule", None), "report"):
            return
        shares = [(self._numbered, self._rows, self._predicted)]
        if trainer.world_size > 1:  # all processes are here
            shares = [(True, True, [])] * trainer.world_size
            torch.distributed.all_gather_object(shares, (self._numbered, self._rows, self._predicted))
        folder, self._predicted = Path(trainer.log_dir or trainer.default_root_dir), []  # log_dir asks them all as well
        if not trainer.is_global_zero:
            return
        if not all(rows for _, rows, _ in shares):
            rank_zero_info("No predictions.csv: queries have more than a row of targets or outputs each.")
            return
        predicted = [each for *_, share in shares for each in share]
        if all(numbered for numbered, *_ in shares):  # an episode that several processes predicted counts once
            by_number = {each.episode: each for each in predicted}
            predicted = [by_number[number] for number in sorted(by_number)]
        else:
            predicted = [each._replace(episode=number) for number, each in enumerate(predicted)]
        rows, broken = prediction_rows(predicted, pl_module.scoring.score)
        file = write_file(folder / "predictions.csv", csv_bytes(rows))
        left = f"; of {broken} the outputs are not finite, nothing is predicted there" if broken else ""
        rank_zero_info(f"Predictions of {len(predicted)} episodes, {len(rows) - 1} queries{left} ({short(file)})")


def prediction_rows(predicted: Sequence[Predicted], score: Score | None) -> tuple[list[list[object]], int]:
    """The table of predictions with its header, and of how many queries the outputs are not finite.

    Args:
        predicted: of episodes that are all of one kind.
        score: how they are scored; accuracy is of labels.
    """
    labeled = score is not None and score.name == "accuracy" and all(each.targets.dim() == 1 for each in predicted)
    one_logit = labeled and score is not None and score.classes is None
    rows: list[list[object]] = []
    broken = width = targets_width = 0
    for episode, targets, outputs in predicted:
        outputs = outputs.reshape(len(targets), -1)
        finite = outputs.isfinite().all(1).tolist()
        targets = targets.reshape(len(targets), -1)
        width, targets_width = max(width, outputs.shape[1]), max(targets_width, targets.shape[1])
        broken += finite.count(False)
        labels = (outputs[:, 0] > 0).long().tolist() if one_logit else outputs.argmax(1).tolist()
        for query, (target, output) in enumerate(zip(targets.tolist(), outputs.tolist(), strict=True)):
            if labeled:
                cells = [target[0], labels[query] if finite[query] else "", *(f"{value:.6f}" for value in output)]
            else:
                cells = [f"{value:.7g}" for value in target]
                cells += [f"{value:.7g}" if finite[query] else "" for value in output]
            rows.append([episode, query, *cells])
    if labeled:
        header = ["label", "predicted", *(f"{'output' if one_logit else 'probability'}_{i}" for i in range(width))]
    else:
        header = [f"target_{i}" for i in range(targets_width)] + [f"predicted_{i}" for i in range(width)]
    rows = [[*row, *[""] * (2 + len(header) - len(row))] for row in rows]  # an episode may have fewer classes
    return [["episode", "query", *header], *rows], broken
