"""Stand-ins for packages that a machine with a GPU may lack, and that its benchmarks never use.

Importing the package needs psutil, matplotlib and rich, of which training uses two functions of the first.
"""

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

UNUSED = ("matplotlib", "rich")


class _Unused(MetaPathFinder, Loader):
    """Finds modules of the absent packages, in which every name stands for anything."""

    def __init__(self, absent: list[str]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.absent else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]


def _free() -> int:
    lines = dict(line.split(":") for line in open("/proc/meminfo"))  # noqa: SIM115
    return int(lines["MemAvailable"].split()[0]) * 1024


def _found(name: str) -> bool:
    if name in sys.modules and sys.modules[name] is None:  # which is how Python is told to do without
        del sys.modules[name]
        return False
    return importlib.util.find_spec(name) is not None


def stand_in() -> list[str]:
    """Put stand-ins in the place of packages that are not installed; returns their names."""
    absent = [name for name in UNUSED if not _found(name)]
    if absent:
        sys.meta_path.append(_Unused(absent))
    if not _found("psutil"):
        stub: Any = ModuleType("psutil")
        stub.virtual_memory = lambda: SimpleNamespace(available=_free())
        stub.pid_exists = lambda pid: os.path.exists(f"/proc/{pid}")
        sys.modules["psutil"] = stub
        absent.append("psutil")
    return absent
