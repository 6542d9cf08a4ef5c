"""What of the network follows from the data where it is not given by hand: each such setting is written once."""

import contextlib
import io
import sys
from collections.abc import Collection
from typing import Any

from jsonargparse import Namespace

NET = "model.net.init_args"
FOLLOWS = {"out_features": "ways", "in_channels": "channels"}  # an argument of the network, and one of the data


def link(parser: Any, given: Namespace | None) -> None:
    """Link the network's arguments to the data's, unless they are given by hand.

    Args:
        parser: of a command.
        given: the command's settings that are given by hand, if they could be read.
    """
    for ours, theirs in FOLLOWS.items():
        if given is None or f"{NET}.{ours}" not in given:
            parser.link_arguments(f"data.init_args.{theirs}", f"{NET}.{ours}")


def linked(parser: Any) -> list[str]:
    """The arguments of the network that follow from the data."""
    targets = [action.target[0] for action in _actions(parser)]
    return [ours for ours in FOLLOWS if f"{NET}.{ours}" in targets]


def _actions(parser: Any) -> list[Any]:
    """The links of a parser, which has no group of them where there are none."""
    group = getattr(parser, "_links_group", None)
    return [] if group is None else [*group._group_actions]


def unlink(parser: Any, names: Collection[str]) -> None:
    """Remove the links of some of the network's arguments."""
    for action in _actions(parser):
        target, network = action.target
        name = target.removeprefix(f"{NET}.")
        if name in names:
            parser._links_group._group_actions.remove(action)
            network.sub_add_kwargs["linked_targets"].discard(name)


def set_by_hand_in(checkpoint: dict[str, Any], defaults: dict[str, Any]) -> set[str]:
    """The network's arguments that the run of a checkpoint was given by hand, so that they do not follow other data.

    Args:
        checkpoint: its content.
        defaults: what of it are the defaults of this run.
    """
    saved = (defaults.get("model.net") or {}).get("init_args") or {}
    followed = (checkpoint.get("settings") or {}).get("linked")
    return set() if followed is None else {name for name in FOLLOWS if name in saved and name not in followed}


def quietly(parse: Any, words: Any) -> Any:
    """What parsing some words gives; None where it ends with a page or an error, which is not printed.

    Args:
        parse: the function.
        words: of the command line, None for those of the process; of ``--print_config`` no notice is taken.
    """
    if words is None:
        words = sys.argv[1:]
    if isinstance(words, list):
        words = [word for word in words if not str(word).startswith("--print_config")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return parse(words)
        except (Exception, SystemExit):  # comes again where it is printed
            return None
