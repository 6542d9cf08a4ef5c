"""LightningCLI with MAML's links and defaults, short help and errors of one line."""

import re
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import lightning
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from maml_lightning import __version__
from maml_lightning.command_line import abstract_numbers, class_paths, help, links, progress, resuming, screen, shipped
from maml_lightning.command_line.ensembles import ensemble_of
from maml_lightning.command_line.errors import advice_for_unknown
from maml_lightning.errors import SettingError
from maml_lightning.trained import packaged
from maml_lightning.training import resume
from maml_lightning.training.checkpoints import LastCheckpoint, read_checkpoint
from maml_lightning.training.checks import check_strategy
from maml_lightning.training.cost import CostMonitor
from maml_lightning.training.inspection import AdaptationMonitor
from maml_lightning.training.monitoring import check_loss, direction, score_of_loss
from maml_lightning.training.reports import PredictionReport, TestReport

SECONDS_TO_LEAVE = 20  # for the other processes, after a signal that all have agreed on
# Of a training that nothing else ends: what the shipped configs with the best results take (18 to 24). Lightning's own
# default is 1,000, which is weeks on pictures.
DEFAULT_EPOCHS = 20

abstract_numbers.register()


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
        message = class_paths.explanation(message) or " ".join(message.split())
        if re.search(r"arguments are required: \w+\.data\b", message):
            message = "no data: give --data NAME, or a --config that has it, such as the config.yaml of a run"
        message += advice_for_unknown(self, message)
        page = "--help_all" if "--help_all" in self._option_string_actions else "--help"
        self.exit(2, f"error: {message} ({page} describes every setting)\n")


class MAMLCommandLine(LightningCLI):
    """LightningCLI with its links and defaults: output size and best checkpoint follow the data."""

    checkpoint: dict[str, Any] | None = None
    resumed_step = 0
    run_folder: Path | None = None  # of the run that ckpt_path last resumes
    given: Namespace = Namespace()  # by hand
    optimizer_follows = False  # from model.outer_lr
    tables = False  # of the scores, at the end

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
        if subcommand == "test":
            parser.add_argument(
                "--ensemble",
                nargs="+",
                help="Checkpoints, or names of those in the package, in place of ckpt_path: their networks are adapted "
                "apart, and their class probabilities averaged.",
            )
        help.add_pages(parser, DEFAULT_EPOCHS)
        parser.first_screen = partial(help.first_screen, parser, subcommand, DEFAULT_EPOCHS)  # type: ignore[attr-defined]
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the callbacks that every run has their flags, and LightningCLI's settings the defaults of MAML."""
        parser.add_argument(
            "--initial_checkpoint",
            type=str | None,
            default=None,
            help="A checkpoint, or the name of one in the package, whose weights, learned inner learning "
            "rates and model settings training starts from, with a new optimizer at epoch 0. If ckpt_path is found, "
            "that run is resumed instead.",
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
            "own. Code of a checkpoint from others could then do anything.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(CostMonitor, "cost")
        parser.add_lightning_class_args(AdaptationMonitor, "inspection")
        parser.add_lightning_class_args(TestReport, "test_report")
        parser.add_lightning_class_args(PredictionReport, "prediction_report")
        parser.set_defaults(
            {
                "trainer.enable_model_summary": False,  # it does not count MAML's operations
                "checkpoint.monitor": None,
                "checkpoint.filename": "best",
                "checkpoint.save_on_train_epoch_end": False,  # it is best by validation, when that is there
                "checkpoint.enable_version_counter": False,
                "model.net": {"class_path": resuming.NETWORK},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's settings as defaults, so that flags and config given by hand win.

        A run that is resumed takes its optimizer, scheduler and seed from the checkpoint likewise.
        """
        given = links.quietly(partial(_given_by_hand, parser), args)
        for name, each in self._subcommand_parsers.items():
            links.link(each, given and given.get(name))
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        if not subcommand:
            return
        config, command = self.config[subcommand], self._subcommand_parsers[subcommand]
        self.given = (given or _given_by_hand(parser, args))[subcommand]
        path, initial = config.get("ckpt_path"), config.initial_checkpoint
        if path in ("best", "hpc", "registry"):
            return
        if path == "last":
            path = resuming.last_of(config, subcommand)
            self.run_folder = path.parent.parent if path and path.parent.name == "checkpoints" else None
        elif path:
            path = packaged(path) or path
        if path or initial:
            setting, name = ("ckpt_path", path) if path else ("initial_checkpoint", initial)
            self.checkpoint = read_checkpoint(Path(packaged(str(name)) or name), setting)
            resumes = subcommand == "fit" and setting == "ckpt_path"
            source = str(path if config.ckpt_path == "last" else config.ckpt_path)
            if resumes:
                resume.check_training_state(self.checkpoint, source)
            defaults = resuming.defaults_of(
                self.checkpoint, f"{setting} {name}", self.given, resumes, config.trust_checkpoint
            )
            if resumes:
                resume.check_readable(self.checkpoint, source)
            command.set_defaults(defaults)
            links.unlink(command, links.set_by_hand_in(self.checkpoint, defaults))
            super().parse_arguments(parser, args)
        self.config[subcommand].ckpt_path = path and str(path)

    def _parse_ckpt_path(self) -> None:
        """Off: Lightning would put the checkpoint's settings over flags given by hand (see parse_arguments)."""

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other settings: the monitor from the data, a scheduler's optimizer from the model.

        ``best.ckpt`` is the best by the data's own score, with weights as they were validated: a period of checkpoints
        applies to ``last.ckpt``. LightningCLI would ignore a scheduler without an optimizer.
        """
        config = self.config[self.subcommand]
        check_strategy(str(getattr(config.trainer.strategy, "class_path", config.trainer.strategy)))
        check_loss(config.model.loss)
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            resuming.check_nothing_is_replaced(config)
        if config.checkpoint.every_n_train_steps:
            config.last_checkpoint.every_n_train_steps = config.checkpoint.every_n_train_steps
            config.checkpoint.every_n_train_steps = None
        if config.get("lr_scheduler") and not config.get("optimizer"):
            self.optimizer_follows = True
            config.optimizer = Namespace(class_path="torch.optim.Adam", init_args=Namespace(lr=config.model.outer_lr))
        if config.checkpoint.monitor is None:
            score = getattr(locate(config.data.class_path), "score", "accuracy") or score_of_loss(config.model.loss)
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

    def instantiate_classes(self) -> None:
        """Instantiate; where a setting raises, its error replaces jsonargparse's list of the types it tried."""
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

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Without the callbacks that the trainer's settings rule out."""
        if config.get("barebones"):
            callbacks, self.save_config_callback = [], None
        elif config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        callbacks = progress.with_bar(callbacks, config)
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Check everything before other processes are started or anything is written; leave no process behind."""
        if self.trainer.local_rank == 0:
            self._check(TrainerFn(subcommand))
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
        there = {place for logger in loggers for place in Path(logger.root_dir).glob("*")}
        rank_zero_info(f"{screen.header(self.config_dump, self.model, self.trainer, subcommand)}.")
        try:
            super()._run_subcommand(subcommand)
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()  # its threads abort a process that ends with them
        except BaseException as error:
            self._end_children(patience=SECONDS_TO_LEAVE if isinstance(error, SystemExit) else 0)
            began = self.trainer.global_step > self.resumed_step
            if isinstance(error, Exception) and self.trainer.is_global_zero and not began:
                resuming.remove_empty_runs({Path(logger.log_dir) for logger in loggers} - there)
            raise

    def _end_children(self, patience: float) -> None:
        """End the processes that this one started; one that waits for it in a collective ends by SIGKILL alone."""
        started = getattr(self.trainer.strategy.launcher, "procs", [])
        children = [*started]
        started.clear()  # else Lightning's observer would kill this process too, before it prints its error
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
        """Print the best score, and the command that tests its checkpoint."""
        screen.say(screen.end_of_fit(self.trainer))

    def after_validate(self) -> None:
        """Print the scores as a table."""
        if self.tables:
            screen.print_scores(self.trainer)

    def after_test(self) -> None:
        """Print the scores, and the command that predicts."""
        self.after_validate()
        screen.say(screen.end_of_test(self.config_dump, self.model))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Without Lightning's own table, of numbers with 16 digits."""
        settings = super()._prepare_subcommand_kwargs(subcommand)
        self.tables = settings.get("verbose", False)
        return {**settings, "verbose": False} if "verbose" in settings else settings

    def after_instantiate_classes(self) -> None:
        """Save the network's settings in the checkpoint; check the checkpoint that is loaded before a run begins."""
        config = {**self.config_dump, **({"optimizer": None} if self.optimizer_follows else {})}
        if config.get("ensemble"):
            self.model = ensemble_of(config, self.given)
            self.config[self.subcommand].model = self.given.model.clone()  # what config.yaml says of each network
            self.trainer.precision_plugin.convert_module(self.model)
            return
        self.model.hparams.update(config["model"])
        followed = links.linked(self._parser(self.subcommand))
        self.model.run_settings = {**resume.run_settings(config), "linked": followed}
        # Weights are loaded in the type that they are trained in: Lightning would load them first and convert then.
        self.trainer.precision_plugin.convert_module(self.model)
        if self.checkpoint and not config["ckpt_path"]:
            self.model.begin_with(self.checkpoint)
        elif self.checkpoint:
            self.model.on_load_checkpoint(self.checkpoint)
            if self.subcommand == "fit":
                self.resumed_step = self.checkpoint["global_step"]
                resuming.check_resumed(self.model, self.checkpoint, config)
                if self.run_folder is not None:
                    given, step = self.config[self.subcommand].trainer.logger, self.checkpoint["global_step"]
                    resuming.log_into(self.run_folder, self.trainer, given, step)
        elif self.subcommand != "fit":
            rank_zero_info("No checkpoint was given (--ckpt_path): the weights are untrained.")
        self.checkpoint = None


def _given_by_hand(parser: LightningArgumentParser, args: ArgsType) -> Namespace:
    """The settings given in flags and configs, without defaults, and the network's class in any case."""
    Parser.by_hand = True
    try:
        return parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)
    finally:
        Parser.by_hand = False
