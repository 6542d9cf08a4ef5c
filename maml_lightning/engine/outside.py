"""What code asks of the world outside as it runs: the clock, files, the terminal. A recorded graph asks nothing."""

import builtins
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from types import FrameType
from typing import Any

from maml_lightning.engine.variables import is_installed

_CLOCK = "reads the clock as it runs"
_CLOCKS = (
    "time",
    "time_ns",
    "perf_counter",
    "perf_counter_ns",
    "monotonic",
    "monotonic_ns",
    "process_time",
    "localtime",
)
_CALLS: dict[int, str] = {
    **{id(getattr(time, name)): _CLOCK for name in _CLOCKS},
    **{id(function): "reads files as it runs" for function in (builtins.open, os.stat, os.listdir, os.scandir)},
    id(builtins.print): "prints as it runs",
    id(os.urandom): "draws the system's random numbers as it runs",
}
_ONCE = {"warnings", "linecache", "importlib", "traceback", "tokenize"}  # what they read, they read once


@contextmanager
def calls_outside() -> Iterator[dict[str, None]]:
    """Note what the user's own code asks, in words that follow "it"; nothing while a profiler of Python is on."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and (what := _CALLS.get(id(called)) or _of_date(called)) and _is_users(frame):
            found[what] = None

    if sys.getprofile() is not None:
        yield found
        return
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _of_date(called: Any) -> str:
    of, name = getattr(called, "__self__", None), called.__name__
    return _CLOCK if isinstance(of, type) and issubclass(of, date) and name in ("now", "utcnow", "today") else ""


def _is_users(frame: FrameType | None) -> bool:
    """Whether the first frame outside of Python's own modules is of the user's code."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        root = module.partition(".")[0]
        if root in _ONCE:
            return False
        if root not in sys.stdlib_module_names or root == "__main__":
            return not is_installed(module)
        frame = frame.f_back
    return False
