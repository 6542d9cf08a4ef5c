"""The command line: ``maml-lightning {fit,validate,test,predict,export,calibrate} --config NAME [flags]``."""

import logging
import os
import signal
import sys
import time
import warnings

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType

from maml_lightning.command_line import calibrating, exporting, shipped
from maml_lightning.command_line.errors import check_words, explain
from maml_lightning.command_line.parser import MAMLCommandLine, Parser
from maml_lightning.training.module import MAML

SECONDS_FOR_THE_FIRST_PROCESS = 3  # to end the others after an error


class _Quiet(logging.Filter):
    """Drops Lightning's messages that do not concern users of this command."""

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
        check_words(sys.argv[1:] if args is None else args)
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
    """Run the command line as a process: an error is one line, its traceback one flag away."""
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as python -m does: networks and data by class path from the current folder
    try:
        if sys.argv[1:2] == ["configs"]:
            return print(shipped.text(*sys.argv[2:]))
        for name, command in (("export", exporting.main), ("calibrate", calibrating.main)):
            if sys.argv[1:2] == [name]:
                return command(sys.argv[2:])
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if "--traceback" in sys.argv or os.environ.get("MAML_LIGHTNING_TRACEBACK"):
            raise
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank:  # the first process ends the others, so that an error which all of them meet is printed once
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        prefix = f"[process {rank}] error" if rank else "error"
        sys.exit(f"{prefix}: {explain(error)}")
