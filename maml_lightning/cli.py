"""The command line: ``maml-lightning {fit,validate,test,predict} --config NAME [flags]``."""

import errno
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import lightning
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from maml_lightning import __version__, class_paths, help, shipped
from maml_lightning.callbacks import Cost, Inspection, PredictionReport, TestReport
from maml_lightning.checkpoints import LastCheckpoint, last_checkpoint, read_checkpoint
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.module import MAML, check_strategy
from maml_lightning.trained import settings_of, trained

# Of a training that nothing else ends: what the shipped configs with the best results take (18 to 24). Lightning's own
# default is 1,000, which is weeks on pictures.
DEFAULT_EPOCHS = 20


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with short messages and screens, and without settings of one network in another."""

    first_screen: Callable[[], str] | None = None  # what --help shows
    color: bool  # of Python 3.14's help, which the pages of one group take apart

    def full_help(self) -> str:
        """A description of every setting."""
        return super().format_help()

    def format_help(self, *args: Any) -> str:
        """The first screen, where there is one."""
        return self.first_screen() if self.first_screen else super().format_help(*args)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, the network's own left out: another network would inherit those that it has a name for."""
        defaults = super().get_defaults(*args, **kwargs)
        given = ArgumentParser.get_default(self, "model.net")
        if given and "init_args" not in given:
            defaults.pop("model.net.init_args", None)
        return defaults

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message alone, without jsonargparse's screens of usage, and end."""
        message = class_paths.refusal(message) or " ".join(message.split())
        self.exit(2, f"error: {message} (--help_all describes every setting)\n")


class MAMLCommandLine(LightningCLI):
    """LightningCLI with its links and defaults: output size and best checkpoint follow the data."""

    checkpoint: dict[str, Any] | None = None
    run_folder: Path | None = None  # of the run that ckpt_path last goes on with

    def init_parser(self, **kwargs: Any) -> Parser:
        """LightningCLI's, whose ``--config`` finds the configs of the package by name."""
        header = [f"maml_lightning=={__version__}", f"lightning=={lightning.__version__}"]
        parser = Parser(dump_header=header, version=__version__, **kwargs)
        parser.add_argument(
            "-c", "--config", action=shipped.ConfigFile, help="A file, or the name of a config of the package."
        )
        parser.first_screen, parser.color = help.overview, False
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        help.add_pages(parser, DEFAULT_EPOCHS)
        parser.first_screen = partial(help.first_screen, parser, subcommand, DEFAULT_EPOCHS)  # type: ignore[attr-defined]
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link ``ways`` and ``channels`` and give the callbacks that every run has their flags."""
        parser.link_arguments("data.init_args.ways", "model.net.init_args.out_features")
        parser.link_arguments("data.init_args.channels", "model.net.init_args.in_channels")
        parser.add_argument(
            "--initial_checkpoint",
            type=str | None,
            default=None,
            help="A checkpoint, or the name of one in the package, whose weights, learnt rates and model settings "
            "training begins with; its optimiser and epochs begin anew. Where ckpt_path is found, that one counts.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(Cost, "cost")
        parser.add_lightning_class_args(Inspection, "inspection")
        parser.add_lightning_class_args(TestReport, "test_report")
        parser.add_lightning_class_args(PredictionReport, "prediction_report")
        parser.set_defaults(
            {
                "checkpoint.monitor": None,
                "checkpoint.filename": "best",
                "checkpoint.save_on_train_epoch_end": False,  # it is best by validation, when that is there
                "checkpoint.enable_version_counter": False,
                "model.net": {"class_path": "maml_lightning.ConvNet"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's settings as defaults, so that flags and config given by hand win."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        path, initial = self.config[subcommand].get("ckpt_path"), self.config[subcommand].initial_checkpoint
        if path in ("best", "hpc", "registry"):
            return
        if path == "last":
            path = self._last(self.config[subcommand])
        elif path:
            path = trained(path) or path
        if path or initial:
            setting, file = ("ckpt_path", path) if path else ("initial_checkpoint", trained(initial) or initial)
            self.checkpoint = read_checkpoint(Path(file), setting)
            known = settings_of(self.checkpoint)
            self._subcommand_parsers[subcommand].set_defaults({f"model.{key}": value for key, value in known.items()})
            super().parse_arguments(parser, args)
        self.config[subcommand].ckpt_path = path and str(path)

    def _last(self, config: Namespace) -> Path | None:
        """The checkpoint that ``ckpt_path last`` stands for; None starts anew.

        Raises:
            SettingError: there is none, and the command is not fit.
        """
        root = Path(config.trainer.default_root_dir or ".")
        folder = Path(config.checkpoint.dirpath or root / "lightning_logs")
        path = last_checkpoint(folder)
        if path is None and self.config.subcommand != "fit":
            raise SettingError(f"ckpt_path last: there is no checkpoint in {folder}; run fit first, or give a path.")
        rank_zero_info(f"ckpt_path last: {path or f'no checkpoint in {folder}, starting anew'}")
        if path and path.parent.name == "checkpoints":
            self.run_folder = path.parent.parent
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty.*")  # it is this run's
        return path

    def _parse_ckpt_path(self) -> None:
        """Off: Lightning would put the checkpoint's settings over flags given by hand (see parse_arguments)."""

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other settings: the monitor from the data, a scheduler's optimizer from the model.

        A period of the checkpoints is that of ``last.ckpt``: best.ckpt holds weights as they were validated.

        ``best.ckpt`` is the best by the data's own score; LightningCLI would ignore a scheduler without an optimizer.
        """
        config = self.config[self.subcommand]
        check_strategy(str(getattr(config.trainer.strategy, "class_path", config.trainer.strategy)))
        if config.checkpoint.every_n_train_steps:
            config.last_checkpoint.every_n_train_steps = config.checkpoint.every_n_train_steps
            config.checkpoint.every_n_train_steps = None
        if config.get("lr_scheduler") and not config.get("optimizer"):
            config.optimizer = Namespace(class_path="torch.optim.Adam", init_args=Namespace(lr=config.model.outer_lr))
        if config.checkpoint.monitor is None:
            score = getattr(locate(config.data.class_path), "score", "accuracy")
            config.checkpoint.monitor = f"val/{score}"
            config.checkpoint.mode = "min" if score == "mse" else "max"

    def instantiate_classes(self) -> None:
        """Instantiate, and let a refused setting speak for itself instead of jsonargparse's list of types tried."""
        trainer = self.config[self.subcommand].trainer
        if self.subcommand == "fit" and (trainer.max_epochs, trainer.max_steps, trainer.max_time) == (None, -1, None):
            trainer.max_epochs = DEFAULT_EPOCHS
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, SettingError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None

    def after_instantiate_classes(self) -> None:
        """Save the network's settings in the checkpoint; refuse another's checkpoint before a run begins."""
        self.model.hparams.update(self.config_dump["model"])
        if self.checkpoint and not self.config[self.subcommand].ckpt_path:
            self.model.begin_with(self.checkpoint)
        elif self.checkpoint:
            self.model.on_load_checkpoint(self.checkpoint)
            if self.run_folder and self.subcommand == "fit" and isinstance(self.trainer.logger, TensorBoardLogger):
                self.trainer.logger = TensorBoardLogger(
                    self.run_folder.parent.parent,
                    self.run_folder.parent.name,
                    self.run_folder.name,
                    purge_step=self.checkpoint["global_step"],  # what was logged after the checkpoint comes again
                )
            self.checkpoint = None


def main(args: ArgsType = None) -> MAMLCommandLine:
    """Run the command line.

    Args:
        args: the words after ``maml-lightning``; None takes them from ``sys.argv``.
    """
    for harmless in (
        ".*args parameter is intended to run from within Python.*",  # which is what main(args) is for
        ".*LeafSpec.*is deprecated.*",  # inside Lightning 2.6 on torch 2.15
        ".*will be overridden by.*configure_optimizers.*",  # which is what --optimizer asks for
        "The dirpath has changed from.*",  # a checkpoint tested in another run's folder
        "Precision .* is not supported by the model summary.*",  # which estimates sizes of 32 bits instead
    ):
        warnings.filterwarnings("ignore", harmless)
    return MAMLCommandLine(
        MAML,
        LightningDataModule,
        subclass_mode_data=True,
        parser_class=Parser,
        seed_everything_default=0,
        auto_configure_optimizers=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def console() -> None:
    """Run the command line as a process: errors that users can mend are one line, without a traceback."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as python -m does: networks and data by class path from the current folder
    try:
        if sys.argv[1:2] == ["configs"]:
            return print(shipped.text(*sys.argv[2:]))
        main()
    except (SettingError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = error.filename or "the run's logs"
        sys.exit(f"error: {what}: {error.strerror}; make room, and go on with --ckpt_path last.")
