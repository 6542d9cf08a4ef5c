"""What TensorBoard shows beside Lightning's scalars: a layout, the table of hyperparameters, learned rates."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from maml_lightning.training.module import MAML

RATES = "variables/inner_lr"  # a group that comes after train and val
ALWAYS = ("inner_lr", "inner_steps", "outer_lr")  # in the table even where they are the default


def layout(names: Sequence[str], rates: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts of TensorBoard's tab "Custom Scalars": scores first.

    Args:
        names: of the scores, such as ``accuracy``.
        rates: tensors with a learned inner learning rate.
    """
    charts: dict[str, dict[str, list[Any]]] = {
        name: {
            f"{name}, training and validation": ["Multiline", [f"train/{name}$", f"val/{name}$"]],
            f"validation {name} after each inner step": ["Multiline", [f"val/{name}_step_\\d+$"]],
        }
        for name in names
    }
    charts["loss"] = {"loss, training and validation": ["Multiline", ["train/loss$", "val/loss$"]]}
    if rates:
        charts["inner learning rates"] = {rate: ["Multiline", [f"{RATES}/{rate}(/step_\\d+)?$"]] for rate in rates}
    return charts


def learned_rates(learned: Mapping[str, Tensor]) -> dict[str, float]:
    """The learned inner learning rates as numbers by tag: a line for each tensor, and for each step if it has several.

    Args:
        learned: by tensor, ``[1]``, one for each step ``[S]``, or one for each weight ``[1, ...]``, of which the mean.
    """
    lines: dict[str, float] = {}
    for name, rate in learned.items():
        means = rate.detach().float().flatten(1).mean(1) if rate.dim() > 1 else rate.detach().float()
        tags = [name] if len(means) == 1 else [f"{name}/step_{step}" for step in range(len(means))]
        lines |= {f"{RATES}/{tag}": mean for tag, mean in zip(tags, means.tolist(), strict=True)}
    return lines


def differing(settings: Mapping[str, Any], of: type) -> dict[str, Any]:
    """The settings that are not the default of a class, and those of ``ALWAYS``, as TensorBoard takes them.

    Args:
        settings: by name; names that the class does not take are left out.
        of: the class.
    """
    defaults = {name: taken.default for name, taken in inspect.signature(of).parameters.items()}
    chosen = {name: settings[name] for name in defaults if name in settings}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in chosen.items()
        if name in ALWAYS or value != defaults[name]
    }


def settings_of(trainer: Trainer, maml: MAML) -> dict[str, Any]:
    """The columns of a run in TensorBoard's table of hyperparameters: network, task and differing settings."""
    data = getattr(trainer, "datamodule", None)
    task = {name: getattr(data, name, None) for name in ("ways", "shots", "query_shots", "meta_batch_size", "split")}
    named = {
        "network": type(maml.net).__name__,
        "data": type(data).__name__.removesuffix("DataModule") if data else None,
        **task,
    }
    kept = {name: value for name, value in named.items() if isinstance(value, int | str)}
    settings = {name: value for name, value in maml.hparams.items() if name not in ("net", "loss", "metric")}
    return {**kept, **differing(settings, MAML)}


def add_row(writer: SummaryWriter, settings: Mapping[str, Any], scores: Sequence[str]) -> None:
    """Make the writer's folder a row of TensorBoard's table of hyperparameters.

    Args:
        writer: of the run's folder.
        settings: the row's columns.
        scores: tags of scalars that are columns as well, once the folder has them.
    """
    for summary in hparams(dict(settings), dict.fromkeys(scores, 0)):
        writer._get_file_writer().add_summary(summary)


def folder_of_training(checkpoint: str | Path | None) -> Path | None:
    """The log folder of the run that wrote a checkpoint, None where TensorBoard has no logs of it."""
    if checkpoint is None or Path(checkpoint).parent.name != "checkpoints":
        return None
    folder = Path(checkpoint).parent.parent
    return folder if any(folder.glob("events.out.tfevents.*")) else None
