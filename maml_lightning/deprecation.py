"""Old names that can be imported for one more release, with a warning."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(module: str, new: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module some of whose names have changed.

    Args:
        module: its ``__name__``.
        new: the import path of what each old name stands for.

    Returns:
        a function that gives what an old name stands for, with a ``DeprecationWarning``.
    """

    def getattr_(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {new[name]}; the old name goes away in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        holder, _, found = new[name].rpartition(".")
        return getattr(importlib.import_module(holder), found)

    return getattr_
