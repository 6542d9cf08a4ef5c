"""Commands that are functions: their arguments are flags, their docstrings the help."""

from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from maml_lightning.command_line import help
from maml_lightning.command_line.parser import Parser


def run(function: Callable[..., Any], name: str, words: list[str]) -> None:
    """Run a command of :data:`help.COMMANDS`.

    Args:
        function: what it does.
        name: of the command.
        words: after ``maml-lightning NAME``.

    Raises:
        SettingError: a setting or a file cannot be used.
    """
    auto_cli(
        function,
        args=words,
        as_positional=False,
        parser_class=Parser,
        prog=f"{help.command()} {name}",
        description=help.COMMANDS[name],
    )
