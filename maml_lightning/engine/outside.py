"""What code does as it runs that no graph does: ask the clock, files, the terminal; set a seed; hook a gradient."""

import builtins
import gc
import io
import os
import sys
import time
import uuid
from _lsprof import Profiler
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from types import FrameType
from typing import Any

import torch

from maml_lightning.engine.variables import is_installed

_CLOCK, _FILES, _RANDOM = (
    "reads the clock as it runs",
    "reads files as it runs",
    "draws the system's random numbers as it runs",
)
_SEED = "sets the seed of torch's random numbers as it runs"
# Autograd runs a hook in each backward pass, a transform in one: where a hook clips, it is long the same.
_HOOK, _HOOKS = "registers hooks of gradients as it runs", {"_register_hook_dict", "register_hook", "register_prehook"}
_TEXT, _VARIABLES = "runs code that it has as text", "asks for all of its variables as it runs"
_OF_TIME = {  # and the same in nanoseconds
    *("time", "perf_counter", "monotonic", "process_time", "thread_time", "clock_gettime"),
    *("localtime", "gmtime", "ctime", "asctime", "strftime", "times"),
}
_NAMED: list[tuple[Any, Iterable[str], str]] = [
    (time, [*_OF_TIME, *(f"{name}_ns" for name in _OF_TIME)], _CLOCK),
    (os, ["times"], _CLOCK),
    (builtins, ["open"], _FILES),
    (io, ["open_code", "FileIO"], _FILES),
    (os, ["open", "read", "stat", "lstat", "listdir", "scandir", "access", "readlink", "getcwd"], _FILES),
    (os, ["urandom", "getrandom"], _RANDOM),
    (uuid, ["_generate_time_safe", "_UuidCreate"], _RANDOM),
    (builtins, ["eval", "exec"], _TEXT),
    (builtins, ["globals"], _VARIABLES),
    (builtins, ["print", "input"], "prints as it runs"),
]
_CALLS: dict[int, str] = {
    id(getattr(owner, name)): what for owner, names, what in _NAMED for name in names if hasattr(owner, name)
}
_READERS = {"torch.serialization", "torch.storage"}
_ONCE = {"warnings", "linecache", "importlib", "traceback", "tokenize"}  # what they read, they read once


@contextmanager
def calls_outside() -> Iterator[dict[str, None]]:
    """Note what the user's own code asks, in words that follow "it"; a profiler of Python rests meanwhile."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call":
            return
        if _is_seed(called):
            found[_SEED] = None
        elif called.__name__ in _HOOKS:
            found[_HOOK] = None
        elif (what := _CALLS.get(id(called)) or _of_date(called)) and _is_users(frame):
            found[what] = None

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        if isinstance(profiler, Profiler):
            profiler.enable()
        else:
            sys.setprofile(profiler)


def _is_seed(called: Any) -> bool:
    return called.__name__ in ("manual_seed", "seed") and isinstance(getattr(called, "__self__", None), torch.Generator)


def _of_date(called: Any) -> str:
    of, name = getattr(called, "__self__", None), called.__name__
    return _CLOCK if isinstance(of, type) and issubclass(of, date) and name in ("now", "utcnow", "today") else ""


def _is_users(frame: FrameType | None) -> bool:
    """Whether the user's code called, or a function of a library that the user's code called."""
    library, collecting = "", {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in collecting:  # garbage is collected at any time
            return False
        module = frame.f_globals.get("__name__", "")
        root = module.partition(".")[0]
        if root in _ONCE:
            return False
        if root not in sys.stdlib_module_names or root == "__main__":
            if not is_installed(module):
                return True
            # Layers call layers: what those of a library ask, the user does not ask, but by `np.load` or `torch.load`.
            if library not in ("", root) or (root == "torch" and module not in _READERS):
                return False
            library = root
        frame = frame.f_back
    return False
