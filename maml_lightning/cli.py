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
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from maml_lightning import __version__
from maml_lightning.command_line import class_paths, help, shipped
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.trained import trained
from maml_lightning.training import resume
from maml_lightning.training.checkpoints import (
    LAST,
    LastCheckpoint,
    last_checkpoint,
    place_of_checkpoints,
    read_checkpoint,
    settings_of,
)
from maml_lightning.training.checks import check_strategy
from maml_lightning.training.cost import CostMonitor
from maml_lightning.training.inspection import AdaptationMonitor
from maml_lightning.training.module import MAML
from maml_lightning.training.monitoring import check_loss, direction
from maml_lightning.training.reports import PredictionReport, TestReport
from maml_lightning.training.trust import check_settings, named, without

NETWORK = "maml_lightning.ConvNet"

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

    by_hand = False  # leave the defaults out

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, the network's own left out: another network would inherit those that it has a name for."""
        defaults = super().get_defaults(*args, **kwargs)
        if Parser.by_hand:  # a parser has to know the class of a network's settings
            return Namespace({"model.net": defaults["model.net"]}) if "model.net" in defaults else Namespace()
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
    given: Namespace = Namespace()  # by hand
    optimizer_follows = False  # from model.outer_lr

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
        parser.add_argument(
            "--trust_checkpoint",
            type=bool,
            default=False,
            help="Import and call whatever network, loss, optimizer or scheduler the checkpoint names, such as your "
            "own; a stranger's checkpoint could so run any code.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(CostMonitor, "cost")
        parser.add_lightning_class_args(AdaptationMonitor, "inspection")
        parser.add_lightning_class_args(TestReport, "test_report")
        parser.add_lightning_class_args(PredictionReport, "prediction_report")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,  # it would count no operations of MAML's
                "checkpoint.monitor": None,
                "checkpoint.filename": "best",
                "checkpoint.save_on_train_epoch_end": False,  # it is best by validation, when that is there
                "checkpoint.enable_version_counter": False,
                "model.net": {"class_path": NETWORK},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's settings as defaults, so that flags and config given by hand win.

        A run that is resumed takes its optimizer, scheduler and seed from the checkpoint likewise.
        """
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        config = self.config[subcommand]
        self.given = _given(parser, args)[subcommand]
        path, initial = config.get("ckpt_path"), config.initial_checkpoint
        if path in ("best", "hpc", "registry"):
            return
        if path == "last":
            path = self._last(config)
        elif path:
            path = trained(path) or path
        if path or initial:
            setting, name = ("ckpt_path", path) if path else ("initial_checkpoint", initial)
            self.checkpoint = read_checkpoint(Path(trained(str(name)) or name), setting)
            resumes = subcommand == "fit" and setting == "ckpt_path"
            if resumes:
                resume.check_training_state(self.checkpoint, str(config.ckpt_path if path != "last" else path))
            known = self._defaults_of(self.checkpoint, f"{setting} {name}", resumes, config.trust_checkpoint)
            self._subcommand_parsers[subcommand].set_defaults(known)
            super().parse_arguments(parser, args)
        self.config[subcommand].ckpt_path = path and str(path)

    def _defaults_of(self, checkpoint: dict[str, Any], source: str, resumes: bool, trust: bool) -> dict[str, Any]:
        """The settings that are a checkpoint's where none were given by hand; it may name no code of others."""
        given, known = self.given, settings_of(checkpoint, MAML)
        settings = checkpoint.get("settings") or {}
        seed = settings.get("seed_everything") if resumes else None
        kinds = {key: settings[key] for key in ("optimizer", "lr_scheduler") if resumes and settings.get(key)}
        known = {key: value for key, value in known.items() if key == "net" or f"model.{key}" not in given}
        net = given.model.net
        if net.class_path == NETWORK:  # not by hand, perhaps
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

    def _last(self, config: Namespace) -> Path | None:
        """The checkpoint that ``ckpt_path last`` stands for; None starts anew.

        Raises:
            SettingError: there is none, and the command is not fit.
        """
        folder, runs = place_of_checkpoints(config.trainer, config.checkpoint.dirpath)
        path = last_checkpoint(folder, runs)
        if path is None and self.config.subcommand != "fit":
            raise SettingError(f"ckpt_path last: there is no checkpoint in {folder}; run fit first, or give a path.")
        rank_zero_info(f"ckpt_path last: {path or f'no checkpoint in {folder}, starting anew'}")
        if path and path.parent.name == "checkpoints":
            self.run_folder = path.parent.parent
        if path:
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
        check_loss(config.model.loss)
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            self._refuse_to_overwrite(config)
        if config.checkpoint.every_n_train_steps:
            config.last_checkpoint.every_n_train_steps = config.checkpoint.every_n_train_steps
            config.checkpoint.every_n_train_steps = None
        if config.get("lr_scheduler") and not config.get("optimizer"):
            self.optimizer_follows = True
            config.optimizer = Namespace(class_path="torch.optim.Adam", init_args=Namespace(lr=config.model.outer_lr))
        if config.checkpoint.monitor is None:
            score = getattr(locate(config.data.class_path), "score", "accuracy")
            config.checkpoint.monitor = f"val/{score}"
        if "checkpoint.mode" not in self.given:
            config.checkpoint.mode = direction(config.checkpoint.monitor, "checkpoint.mode")
        callbacks = config.trainer.callbacks or []
        pairs = [(config.get("lr_scheduler"), self.given.get("lr_scheduler"), "lr_scheduler.mode")]
        if isinstance(callbacks, list):
            by_hand = self.given.get("trainer.callbacks") or []
            pairs += [(*pair, "trainer.callbacks.mode") for pair in zip(callbacks, by_hand, strict=False)]
        for made, by_hand, setting in pairs:
            settings = getattr(made, "init_args", None)
            if (
                by_hand
                and settings
                and settings.get("monitor")
                and "mode" in settings
                and "init_args.mode" not in by_hand
            ):
                settings.mode = direction(settings.monitor, setting)

    def _refuse_to_overwrite(self, config: Namespace) -> None:
        """Refuse to start a run where another's checkpoints would be replaced."""
        folder, runs = place_of_checkpoints(config.trainer, config.checkpoint.dirpath)
        resumed = Path(config.ckpt_path).parent.resolve() == folder.resolve() if config.ckpt_path else False
        requeued = SLURMEnvironment.detect() and list(Path(config.trainer.default_root_dir or ".").glob("hpc_ckpt_*"))
        if runs or resumed or requeued:
            return
        for file in (folder / LAST, folder / f"{config.checkpoint.filename}.ckpt"):
            if file.exists():
                raise SettingError(
                    f"fit would replace {file}, which another run left; resume that run with --ckpt_path last, or give "
                    "another --trainer.default_root_dir or --checkpoint.dirpath."
                )

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
        config = {**self.config_dump, **({"optimizer": None} if self.optimizer_follows else {})}
        self.model.hparams.update(config["model"])
        self.model.run_settings = resume.run_settings(config)
        # Weights are loaded in the type that they are trained in: Lightning would load them first and convert then.
        self.trainer.precision_plugin.convert_module(self.model)
        if self.checkpoint and not config["ckpt_path"]:
            self.model.begin_with(self.checkpoint)
        elif self.checkpoint:
            self.model.on_load_checkpoint(self.checkpoint)
            if self.subcommand == "fit":
                self._resume(self.checkpoint, config)
        elif self.subcommand != "fit":
            rank_zero_info("No checkpoint was given (--ckpt_path): the weights are untrained.")
        self.checkpoint = None

    def _resume(self, checkpoint: dict[str, Any], config: dict[str, Any]) -> None:
        """Refuse what cannot be applied to the run, say what is, and log into its folder."""
        resume.check_precision(self.model, checkpoint)
        configured = self.model.configure_optimizers()
        optimizers, schedulers = [configured], []
        if isinstance(configured, dict):
            optimizers, schedulers = [configured["optimizer"]], [configured["lr_scheduler"]["scheduler"]]
        elif isinstance(configured, tuple):
            optimizers, schedulers = configured
        resume.check_optimizers(checkpoint, optimizers, schedulers)
        if changes := resume.check_settings_of_run(checkpoint, config):
            rank_zero_info(f"Resumed with {'; '.join(changes)}.")
        if self.run_folder is None:
            return
        loggers = self.trainer.loggers
        given = self.config[self.subcommand].trainer.logger
        for index, logger in enumerate(loggers):
            if isinstance(logger, TensorBoardLogger) and Path(logger.root_dir) == self.run_folder.parent:
                by_hand = given[index] if isinstance(given, list) else given
                settings = by_hand.init_args.as_dict() if isinstance(by_hand, Namespace) else {}
                loggers[index] = TensorBoardLogger(
                    **{
                        "save_dir": logger.save_dir,
                        "name": logger.name,
                        **settings,
                        "version": self.run_folder.name,
                        "purge_step": checkpoint["global_step"],  # what was logged after the checkpoint comes again
                    }
                )
        self.trainer.loggers = loggers


class _Quiet(logging.Filter):
    """Drops Lightning's messages that tell users of this command nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage()


def _given(parser: LightningArgumentParser, args: ArgsType) -> Namespace:
    """What was given by hand, in flags and configs, and the network's class in any case."""
    Parser.by_hand = True
    try:
        return parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)
    finally:
        Parser.by_hand = False


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
