"""The command line: ``maml-lightning {fit,validate,test,predict} --config NAME [flags]``."""

import errno
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import lightning
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from maml_lightning import __version__, class_paths, help, shipped
from maml_lightning.callbacks import Cost, Inspection, PredictionReport, TestReport
from maml_lightning.checkpoints import LastCheckpoint, last_checkpoint, read_checkpoint
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.module import MAML, check_strategy
from maml_lightning.trained import settings_of, trained

SECONDS_FOR_THE_FIRST_PROCESS = 3  # to end the others after an error
SECONDS_TO_LEAVE = 20  # for the others, after a signal that all have agreed on
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
        parser.add_argument(
            "--traceback",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Show where an error came from; MAML_LIGHTNING_TRACEBACK=1 does so as well.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(Cost, "cost")
        parser.add_lightning_class_args(Inspection, "inspection")
        parser.add_lightning_class_args(TestReport, "test_report")
        parser.add_lightning_class_args(PredictionReport, "prediction_report")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,  # it would count no operations of MAML's
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
            chain: list[BaseException] = [error]
            while cause := chain[-1].__cause__ or chain[-1].__context__:
                chain.append(cause)
            setting = next((cause for cause in chain if isinstance(cause, SettingError)), None)
            raise setting or (chain[-1] if "does not validate" in str(error).lower() else error) from None

    def before_fit(self) -> None:
        """Say what is trained."""
        sizes = [value.numel() for value in self.model.net.parameters()]
        rank_zero_info(f"{type(self.model.net).__name__}: {sum(sizes):,} parameters in {len(sizes)} tensors.")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Without the callbacks that the trainer's settings rule out."""
        if config.get("barebones"):
            callbacks, self.save_config_callback = [], None
        elif config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Check everything before other processes are started or anything is written; leave no process behind."""
        if self.trainer.local_rank == 0:
            self._check(TrainerFn(subcommand))
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            self._end_children(patience=SECONDS_TO_LEAVE if isinstance(error, SystemExit) else 0)
            raise

    def _end_children(self, patience: float) -> None:
        """End the processes that this one started; one that waits for it in a collective heeds only SIGKILL."""
        started = getattr(self.trainer.strategy.launcher, "procs", [])
        children = [*started]
        started.clear()  # else Lightning's observer of them would kill this process too, before it can speak
        for child in children:
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _check(self, stage: TrainerFn) -> None:
        """Do what Lightning does in ``prepare_data``, which it calls when all processes run and wait for each other."""
        self.trainer.datamodule, self.trainer.state.fn = self.datamodule, stage  # type: ignore[attr-defined]
        self.model.trainer = self.datamodule.trainer = self.trainer
        self.trainer.strategy.connect(self.model)
        self.datamodule.prepare_data()
        self.model.prepare_data()

    def after_fit(self) -> None:
        """Say what came out, and what to do with it."""
        best = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if best is None or not best.best_model_path or best.best_model_score is None:
            return
        config, path = Path(self.trainer.log_dir or "") / "config.yaml", os.path.relpath(best.best_model_path)
        data = f"--config {os.path.relpath(config)}" if config.is_file() else "with the same --data"
        rank_zero_info(
            f"Best {best.monitor}: {best.best_model_score:.4f} ({path}). "
            f"Test it: {help.command()} test {data} --ckpt_path {path}"
        )

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
        elif self.subcommand != "fit" and not self.config[self.subcommand].ckpt_path:
            rank_zero_info("No checkpoint was given (--ckpt_path): the weights are untrained.")


class _Quiet(logging.Filter):
    """Drops Lightning's messages that tell users of this command nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage()


def main(args: ArgsType = None) -> MAMLCommandLine:
    """Run the command line.

    Args:
        args: the words after ``maml-lightning``; None takes them from ``sys.argv``.

    Raises:
        SettingError: a setting or a file cannot be used.
        NonFiniteError: a loss, a gradient or an output is not finite.
    """
    for harmless in (
        ".*args parameter is intended to run from within Python.*",  # which is what main(args) is for
        ".*LeafSpec.*is deprecated.*",  # inside Lightning 2.6 on torch 2.15
        ".*will be overridden by.*configure_optimizers.*",  # which is what --optimizer asks for
        "The dirpath has changed from.*",  # a checkpoint tested in another run's folder
        r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # which is what barebones asks for
        "Precision .* is not supported by the model summary.*",  # which estimates sizes of 32 bits instead
    ):
        warnings.filterwarnings("ignore", harmless)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_Quiet())
    if args is None or isinstance(args, list):
        _check_words(sys.argv[1:] if args is None else args)
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


def _check_words(words: list[str]) -> None:
    """Refuse what the parser would take for something else, or fail at without naming it."""
    for before, word in pairwise(["", *words]):
        flag, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if flag.startswith("--") and not value and (not word or word.endswith("=")) and flag != "--print_config":
            raise SettingError(
                f"{flag[2:]} is empty (a shell variable that is not set?); give a value, or leave the flag out."
            )
        if flag == "--config" and Path(value).is_file():
            try:
                Path(value).read_text()
            except UnicodeDecodeError as error:
                raise SettingError(f"config {value} is not a text file ({error.reason}); give one in YAML.") from error


def console() -> None:
    """Run the command line as a process: an error is one line, its traceback one flag away."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as python -m does: networks and data by class path from the current folder
    try:
        if sys.argv[1:2] == ["configs"]:
            return print(shipped.text(*sys.argv[2:]))
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if "--traceback" in sys.argv or os.environ.get("MAML_LIGHTNING_TRACEBACK"):
            raise
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank:  # the first process ends the others: what it meets as well is not said twice
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        prefix = f"[process {rank}] error" if rank else "error"
        sys.exit(f"{prefix}: {explain(error)}")


def explain(error: BaseException) -> str:
    """An error in one line: ours as it is, anybody else's with its type and place.

    Args:
        error: what was raised.
    """
    message = " ".join(str(error).split())
    if isinstance(error, SettingError | NonFiniteError | MisconfigurationException):
        return message
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else "" if error.errno != errno.ENOSPC else "the run's logs: "
        remedy = {
            errno.ENOSPC: "; make room, and resume with --ckpt_path last",
            errno.EROFS: "; give another folder with --trainer.default_root_dir",
            errno.EACCES: "; give another folder with --trainer.default_root_dir, or the right to use it",
        }.get(error.errno or 0, "")
        return f"{where}{error.strerror}{remedy}."
    if "gloo" in message or "NCCL" in message:
        return f"Another process of the run ended, or cannot be reached ({message})."
    libraries = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), __file__, "<")
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    if message and not own:  # what a library refuses, called with the settings
        return message
    place = f"{type(error).__name__} at {own[-1].filename}, line {own[-1].lineno}; " if own else ""
    return f"{message or type(error).__name__} ({place}--traceback shows how it came about)"
