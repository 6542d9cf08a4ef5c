"""The command line: ``python cli.py {fit,validate,test,predict} --config configs/NAME.yaml [flags]``."""

import inspect
import pickle
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from maml_lightning import MAML, Cost, SettingError, TestReport


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with short messages and without settings of one network in another."""

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, the network's own left out: another network would inherit those that it has a name for."""
        defaults = super().get_defaults(*args, **kwargs)
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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link ``ways`` and give the callbacks that every run has their flags."""
        parser.link_arguments("data.init_args.ways", "model.net.init_args.out_features")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Cost, "cost")
        parser.add_lightning_class_args(TestReport, "test_report")
        parser.set_defaults(
            {
                "checkpoint.monitor": None,
                "checkpoint.save_last": True,
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "model.net": {"class_path": "maml_lightning.ConvNet"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse with the checkpoint's settings as defaults, so that flags and config given by hand win."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        path = subcommand and self.config[subcommand].get("ckpt_path")
        if not path or path in ("best", "last", "hpc", "registry"):
            return
        self.checkpoint = read_checkpoint(Path(path))
        settings = self.checkpoint.get("hyper_parameters", {})
        known = {key: value for key, value in settings.items() if key in inspect.signature(MAML).parameters}
        self._subcommand_parsers[subcommand].set_defaults({f"model.{key}": value for key, value in known.items()})
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Off: Lightning would put the checkpoint's settings over flags given by hand (see parse_arguments)."""

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from other settings: the monitor from the data, a scheduler's optimizer from the model.

        ``best.ckpt`` is the best by the data's own score; LightningCLI would ignore a scheduler without an optimizer.
        """
        config = self.config[self.subcommand]
        if config.get("lr_scheduler") and not config.get("optimizer"):
            config.optimizer = Namespace(class_path="torch.optim.Adam", init_args=Namespace(lr=config.model.outer_lr))
        if config.checkpoint.monitor is None:
            score = getattr(locate(config.data.class_path), "score", "accuracy")
            config.checkpoint.monitor = f"val/{score}"
            config.checkpoint.mode = "min" if score == "mse" else "max"

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
        self.model.hparams.update(self.config_dump["model"])
        if self.checkpoint:
            self.model.on_load_checkpoint(self.checkpoint)
            self.checkpoint = None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint's weights and plain values; code in it does not run.

    Raises:
        SettingError: there is no file, or it is no checkpoint, or it holds more than weights and plain values.
    """
    if not path.is_file():
        raise SettingError(f"ckpt_path {path} is not a file; give a checkpoint that fit wrote, such as .../last.ckpt.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = (
            "it holds more than weights and plain values"
            if "GLOBAL" in str(error)
            else "it is damaged or no checkpoint"
        )
        raise SettingError(f"ckpt_path {path} was not loaded: {reason}; give a checkpoint that fit wrote.") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise SettingError(f"ckpt_path {path} holds no state_dict; give a checkpoint that fit wrote.")
    return checkpoint


def main(args: ArgsType = None) -> MAMLCommandLine:
    """Run the command line.

    Args:
        args: the words after ``cli.py``; None takes them from ``sys.argv``.
    """
    for harmless in (
        ".*args parameter is intended to run from within Python.*",  # which is what main(args) is for
        ".*LeafSpec.*is deprecated.*",  # inside Lightning 2.6 on torch 2.15
        ".*will be overridden by.*configure_optimizers.*",  # which is what --optimizer asks for
        "The dirpath has changed from.*",  # a checkpoint tested in another run's folder
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


if __name__ == "__main__":
    try:
        main()
    except SettingError as error:
        sys.exit(f"error: {error}")
