"""What concerns checkpoints on the command line: settings that come from them, and runs that are resumed."""

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from maml_lightning.errors import SettingError
from maml_lightning.training import resume
from maml_lightning.training.checkpoints import LAST, last_checkpoint, place_of_checkpoints, settings_of
from maml_lightning.training.module import MAML
from maml_lightning.training.trust import check_settings, named, without

NETWORK = "maml_lightning.ConvNet"  # the default


def defaults_of(
    checkpoint: dict[str, Any], source: str, given: Namespace, resumes: bool, trust: bool
) -> dict[str, Any]:
    """A checkpoint's settings as defaults: they apply where none were given by hand.

    Args:
        checkpoint: its content.
        source: what named it, for errors.
        given: the settings given by hand.
        resumes: whether training resumes, so that optimizer, scheduler and seed are the checkpoint's as well.
        trust: whether it may name code outside this package and PyTorch.

    Raises:
        SettingError: it names such code.
    """
    known = settings_of(checkpoint, MAML)
    settings = checkpoint.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    seed = settings.get("seed_everything") if resumes else None
    kinds = {key: settings[key] for key in ("optimizer", "lr_scheduler") if resumes and settings.get(key)}
    known = {key: value for key, value in known.items() if key == "net" or f"model.{key}" not in given}
    net = given.model.net
    if net.class_path == NETWORK:  # which may be the default
        net = Namespace(init_args=net.get("init_args"))
    if isinstance(known.get("net"), dict):
        known["net"] = without(known["net"], net)
    kinds = {key: without(value, given.get(key) or Namespace()) for key, value in kinds.items()}
    known, kinds = ({key: value for key, value in some.items() if value != {}} for some in (known, kinds))
    if not trust:
        remedy = "give it by hand (--model.net, --model.loss, …) or, if you trust the file, --trust_checkpoint true"
        check_settings({**known, **kinds}, source, named(given), remedy)
    defaults = {**{f"model.{key}": value for key, value in known.items()}, **kinds}
    return {**defaults, "seed_everything": seed} if isinstance(seed, int) else defaults


def last_of(config: Namespace, subcommand: str) -> Path | None:
    """The checkpoint that ``ckpt_path last`` stands for; None starts from the beginning.

    Args:
        config: the settings of the command.
        subcommand: its name.

    Raises:
        SettingError: there is none, and the command is not fit.
    """
    folder, runs = place_of_checkpoints(config.trainer, config.checkpoint.dirpath)
    path = last_checkpoint(folder, runs)
    if path is None and subcommand != "fit":
        raise SettingError(f"ckpt_path last: there is no checkpoint in {folder}; run fit first, or give a path.")
    rank_zero_info(f"ckpt_path last: {path or f'no checkpoint in {folder}; training starts from the beginning'}")
    if path:
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty.*")  # it is this run's
    return path


def check_nothing_is_replaced(config: Namespace) -> None:
    """Check that a new run would not replace the checkpoints of another.

    Args:
        config: the settings of fit.

    Raises:
        SettingError: it would.
    """
    folder, runs = place_of_checkpoints(config.trainer, config.checkpoint.dirpath)
    resumed = Path(config.ckpt_path).parent.resolve() == folder.resolve() if config.ckpt_path else False
    requeued = SLURMEnvironment.detect() and list(Path(config.trainer.default_root_dir or ".").glob("hpc_ckpt_*"))
    if runs or resumed or requeued:
        return
    for file in (folder / LAST, folder / f"{config.checkpoint.filename}.ckpt"):
        if file.exists():
            raise SettingError(
                f"fit would replace {file}, a checkpoint of another run; resume that run with --ckpt_path last, or "
                "give another --trainer.default_root_dir or --checkpoint.dirpath."
            )


def check_resumed(model: MAML, checkpoint: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that all settings can be applied to the resumed run, and print those that differ from the checkpoint's.

    Args:
        model: whose optimizers and schedulers continue.
        checkpoint: that it resumes from.
        config: the settings of the command, as it dumps them.

    Raises:
        SettingError: a setting cannot be applied.
    """
    resume.check_precision(model, checkpoint)
    configured: Any = model.configure_optimizers()
    optimizers, schedulers = [configured], []
    if isinstance(configured, dict):
        optimizers, schedulers = [configured["optimizer"]], [configured["lr_scheduler"]["scheduler"]]
    elif isinstance(configured, tuple):
        optimizers, schedulers = configured
    resume.check_optimizers(checkpoint, optimizers, schedulers)
    if changes := resume.check_settings_of_run(checkpoint, config):
        rank_zero_info(f"Resumed with {'; '.join(changes)}.")


def log_into(folder: Path, trainer: Trainer, given: Any, step: int) -> None:
    """Have a resumed run's TensorBoard logger continue in the run's folder.

    Args:
        folder: of the run.
        trainer: whose loggers are replaced.
        given: the setting ``trainer.logger``.
        step: of the checkpoint; what was logged after it comes again.
    """
    loggers = list(trainer.loggers)
    for index, logger in enumerate(loggers):
        if isinstance(logger, TensorBoardLogger) and Path(logger.root_dir).resolve() == folder.parent.resolve():
            by_hand = given[index] if isinstance(given, list) else given
            settings = by_hand.init_args.as_dict() if isinstance(by_hand, Namespace) else {}
            place = {"save_dir": logger.save_dir, "name": logger.name, **settings}
            loggers[index] = TensorBoardLogger(**{**place, "version": folder.name, "purge_step": step})
    trainer.loggers = loggers


def remove_empty_runs(folders: set[Path]) -> None:
    """Remove the log folders of a run that failed before its first meta-step.

    Args:
        folders: that the run made. One that holds more than its settings and logs stays.
    """
    for folder in folders:
        files = {file.name for file in folder.rglob("*") if file.is_file()}
        if all(name in ("config.yaml", "hparams.yaml") or name.startswith("events.out.tfevents.") for name in files):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other runs
                folder.parent.rmdir()
