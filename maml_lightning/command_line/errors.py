"""Errors of the command line in one line."""

import errno
import re
import sysconfig
import traceback
from argparse import ArgumentParser, _SubParsersAction
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from maml_lightning.devices import of_lost_gpu
from maml_lightning.errors import NonFiniteError, SettingError

# Files whose frames do not tell where an error came from: those of libraries, and the command line's own.
_LIBRARIES = (
    sysconfig.get_path("purelib"),
    sysconfig.get_path("stdlib"),
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "cli.py"),
    "<",
)


def check_words(words: list[str]) -> None:
    """Check for what the parser would take for something else, or fail at without naming it.

    Args:
        words: after ``maml-lightning``.

    Raises:
        SettingError: a flag has an empty value, or a config is not a text file.
    """
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


def advice_for_unknown(parser: ArgumentParser, message: str) -> str:
    """What to do about an option that there is none of, for the end of the message that says so; else empty.

    Args:
        parser: that wrote the message.
        message: in one line.
    """
    if re.fullmatch(r"Option '\S+' is not accepted", message):
        return "; check its spelling, and give a class (--data NAME, --model.net CLASS) before its settings"
    found = re.search(
        r"(?:Subcommand '(?P<command>\w+)' does not accept option '|unrecognized arguments: --)(?P<name>[\w.]+)",
        message,
    )
    if not found:
        return ""
    commands = next((each.choices for each in parser._actions if isinstance(each, _SubParsersAction)), None) or {}
    options = commands.get(found["command"], parser)._option_string_actions  # a config's are of its command
    near = get_close_matches(f"--{found['name']}", options, 1)
    return f"; did you mean {near[0].removeprefix('--')}?" if near else ""


def explain(error: BaseException) -> str:
    """An error in one line: the package's as it is, others with their type and place.

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
    if lost := of_lost_gpu(error):
        return lost
    if "gloo" in message or "NCCL" in message:
        return f"Another process of the run ended, or cannot be reached ({message})."
    name, message, frames = _of_worker(str(error)) or (
        type(error).__name__,
        message,
        [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)],
    )
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    if message and not own:  # what a library raises about the settings
        return message
    place = f"{name} at {own[-1][0]}, line {own[-1][1]}; " if own else ""
    return f"{message or name} ({place}--traceback shows how it came about)"


def _of_worker(text: str) -> tuple[str, str, list[tuple[str, str]]] | None:
    """Name, message and frames of an error in a data loader's worker, which torch puts into the text of another."""
    found = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback", text)
    if found is None:
        return None
    frames = re.findall(r'^  File "(.+)", line (\d+)', text, re.MULTILINE)
    message = re.split(rf"^[\w.]*{found[1]}\b:?", text, flags=re.MULTILINE)[-1]
    return found[1], " ".join(message.split()), frames
