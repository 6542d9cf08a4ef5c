"""What the screen says of a run: what will run, on which device and where it logs; its scores; the next command."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table

from maml_lightning.analysis.runs import algorithm_text, task_text
from maml_lightning.command_line.help import command
from maml_lightning.errors import SettingError
from maml_lightning.files import short
from maml_lightning.trained import packaged
from maml_lightning.training.checkpoints import LastCheckpoint
from maml_lightning.training.ensembles import Ensemble
from maml_lightning.training.trust import check_settings

# Messages of Lightning that repeat the header, or advertise.
NOISE = (
    "litlogger",
    "Seed set to",
    "GPU available: ",
    "TPU available: ",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "`Trainer.fit` stopped: `max_",
)
HARMLESS = (
    ".*args parameter is intended to run from within Python.*",  # which is what main(args) is for
    ".*LeafSpec.*is deprecated.*",  # inside Lightning 2.6 on torch 2.15
    ".*will be overridden by.*configure_optimizers.*",  # which is what --optimizer asks for
    "The dirpath has changed from.*",  # a checkpoint tested in another run's folder
    r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # which is what barebones asks for
    "Precision .* is not supported by the model summary.*",  # which estimates sizes of 32 bits instead
    "The number of training batches .* is smaller than the logging interval.*",  # steps count across epochs
)


class _Quiet(logging.Filter):
    """Drops Lightning's messages that do not concern users of this command."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "hpc_ckpt" in message or not any(noise in message for noise in NOISE)  # which SLURM's requeuing loads


class _Lines(logging.StreamHandler):
    """Writes to what is stderr now: while a progress bar moves, above it."""

    @property
    def stream(self) -> TextIO:
        """Where lines go."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def quieten() -> None:
    """Leave out what does not concern users of this command."""
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_Quiet())


def write_above_the_bar() -> None:
    """Let Lightning's lines and warnings appear above a progress bar, warnings of it without the place in its code."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        if logger.handlers and all(type(handler) is logging.StreamHandler for handler in logger.handlers):
            logger.handlers = [_Lines()]
    with_place = warnings.formatwarning

    def without(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if f"{os.sep}lightning{os.sep}" in filename:
            return f"Warning: {message}\n"
        return with_place(message, category, filename, lineno, line)

    warnings.formatwarning = without


def header(config: dict[str, Any], module: LightningModule, trainer: Trainer, stage: str = "fit") -> str:
    """Such as ``MAML, 1 inner step; 5-way 1-shot of GlyphsDataModule; ConvNet, 112,005 parameters in 14 tensors; …``.

    Args:
        config: the settings, as a run's ``config.yaml`` has them.
        module: with the network, or an ensemble.
        trainer: with devices and loggers.
        stage: ``fit`` or another; the others take ``eval_inner_steps`` and name the checkpoint.
    """
    model = config.get("model") or {}
    if stage != "fit" and model.get("eval_inner_steps") is not None:
        config = {**config, "model": {**model, "inner_steps": model["eval_inner_steps"]}}
    checkpoint = config.get("ckpt_path")
    # The first logger's folder alone: the next one takes the next number, once this one is there.
    folder = getattr(trainer.logger, "log_dir", None)
    processes = trainer.num_devices * trainer.num_nodes
    parts = [
        algorithm_text(config),
        task_text(config),
        _network(module),
        f"checkpoint {_name(checkpoint)}" if checkpoint and not isinstance(module, Ensemble) else "",
        f"on {trainer.strategy.root_device.type}" + (f", {processes} processes" if processes > 1 else ""),
        f"logs in {short(folder)}" if folder else "no logs",
    ]
    return "; ".join(filter(None, parts))


def _network(module: LightningModule) -> str:
    if isinstance(module, Ensemble):
        return f"an ensemble of {len(module.names)} networks"
    net = module.get_submodule("net")
    sizes = [value.numel() for value in net.parameters()]
    return f"{type(net).__name__}, {sum(sizes):,} parameters in {len(sizes)} tensors"


def _name(checkpoint: str | Path) -> str:
    """A checkpoint as ``--ckpt_path`` takes it: one of the package by its name."""
    name = Path(checkpoint).stem
    return name if str(packaged(name)) == str(checkpoint) else short(checkpoint)


def end_of_fit(trainer: Trainer) -> str | None:
    """The best score, and the command that tests its checkpoint; nothing where no checkpoint was written."""
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    if best is None or not best.best_model_path or best.best_model_score is None:
        last = next((c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        there = last is not None and last.is_file()
        return f"No validation yet. The last weights are in {os.path.relpath(last)}." if last and there else None
    config, path = Path(trainer.log_dir or "") / "config.yaml", os.path.relpath(best.best_model_path)
    data = f"--config {os.path.relpath(config)}" if config.is_file() else "with the same --data"
    return (
        f"Best {best.monitor}: {best.best_model_score:.4f} ({path}). "
        f"Test it: {command()} test {data} --ckpt_path {path}"
    )


def end_of_test(config: dict[str, Any], module: LightningModule) -> str | None:
    """The command that classifies pictures with the network that was tested; nothing of a network of other inputs."""
    checkpoint = config.get("ckpt_path")
    if not checkpoint or isinstance(module, Ensemble) or getattr(module, "inputs", None) is None:
        return None
    return (
        f"Classify your own pictures with it: {command()} predict --ckpt_path {_name(checkpoint)} "
        f"{_own_code(config.get('model') or {})}--data SupportQueryDataModule --data.support FOLDER --data.query FOLDER"
    )


def _own_code(model: dict[str, Any]) -> str:
    """The flags that name code of the user's own again: that which only a checkpoint names is not run."""
    flags = ""
    for setting in ("net", "loss", "metric"):
        value = model.get(setting)
        try:
            check_settings({setting: value}, "checkpoint")
        except SettingError:
            flags += f"--model.{setting} {value['class_path'] if isinstance(value, dict) else value} "
    return flags


def say(line: str | None) -> None:
    """Print a line in the first process, if there is one."""
    if line:
        rank_zero_info(line)


def print_scores(trainer: Trainer) -> None:
    """Print what was logged as a table, a row for each tag, in the first process."""
    table = Table("metric", "value")
    for name, value in sorted(trainer.callback_metrics.items()):
        table.add_row(name, f"{float(value):#.4g}")
    if trainer.is_global_zero:
        Console().print(table)
