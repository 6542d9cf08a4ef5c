"""The command line: ``maml-lightning {fit,validate,test,predict,export,calibrate} --config NAME [flags]``."""

import os
import select
import signal
import sys
import time

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType

from maml_lightning.command_line import calibrating, exporting, shipped
from maml_lightning.command_line.errors import check_words, explain
from maml_lightning.command_line.parser import MAMLCommandLine, Parser
from maml_lightning.command_line.screen import quieten, write_above_the_bar
from maml_lightning.training.module import MAML

SECONDS_FOR_THE_FIRST_PROCESS = 3  # to end the others after an error


def main(args: ArgsType = None) -> MAMLCommandLine:
    """Run the command line.

    Args:
        args: the words after ``maml-lightning``; None takes them from ``sys.argv``.

    Raises:
        SettingError: a setting or a file cannot be used.
        NonFiniteError: a loss, a gradient or an output is not finite.
    """
    quieten()
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
    write_above_the_bar()
    try:
        if sys.argv[1:2] == ["configs"]:
            return print(shipped.text(*sys.argv[2:]), flush=True)
        for name, command in (("export", exporting.main), ("calibrate", calibrating.main)):
            if sys.argv[1:2] == [name]:
                return command(sys.argv[2:])
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_ended():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
            sys.exit(128 + signal.SIGPIPE)
        if "--traceback" in sys.argv or os.environ.get("MAML_LIGHTNING_TRACEBACK"):
            raise
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank:  # the first process ends the others, so that an error which all of them meet is printed once
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        prefix = f"[process {rank}] error" if rank else "error"
        sys.exit(f"{prefix}: {explain(error)}")


def _reader_has_ended() -> bool:
    """Whether nothing reads what this process prints any more, as after ``| head``."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in stdout.poll(0))
