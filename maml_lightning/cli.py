"""The command line: ``maml-lightning {fit,validate,test,predict} --config NAME [flags]``."""

import errno
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from maml_lightning import resume
from maml_lightning.callbacks import Cost, Inspection, PredictionReport, TestReport
from maml_lightning.checkpoints import (
    LAST,
    LastCheckpoint,
    last_checkpoint,
    place_of_checkpoints,
    read_checkpoint,
    settings_of,
)
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.module import MAML, check_strategy
from maml_lightning.monitoring import check_loss, direction
from maml_lightning.trained import trained
from maml_lightning.trust import check_settings, named, without

NETWORK = "maml_lightning.ConvNet"


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with short messages and without settings of one network in another."""

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
        self.exit(2, f"error: {message}\nEvery setting is described by --help.\n")


class MAMLCommandLine(LightningCLI):
    """LightningCLI with its links and defaults: output size and best checkpoint follow the data."""

    checkpoint: dict[str, Any] | None = None
    run_folder: Path | None = None  # of the run that ckpt_path last goes on with
    given: Namespace = Namespace()  # by hand
    optimizer_follows = False  # from model.outer_lr

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
            "--trust_checkpoint",
            type=bool,
            default=False,
            help="Import and call whatever network, loss, optimizer or scheduler the checkpoint names, such as your "
            "own; a stranger's checkpoint could so run any code.",
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
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, SettingError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None

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
    try:
        main()
    except (SettingError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = error.filename or "the run's logs"
        sys.exit(f"error: {what}: {error.strerror}; make room, and go on with --ckpt_path last.")
