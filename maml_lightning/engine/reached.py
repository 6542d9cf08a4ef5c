"""Which functions the code of a network may call: found by reading it, a few more than it calls taken for called."""

from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from maml_lightning.engine.variables import PLAIN, functions_in, is_fixed, names_of

# What gives a function by a name that code makes.
_BY_NAME = {
    *("getattr", "getattr_static", "__getattribute__", "attrgetter", "methodcaller", "__dict__", "vars"),
    *("globals", "import_module", "__import__"),
}


def may_call(value: Any, names: frozenset[str]) -> bool:
    """Whether code that a value has, or has hold of, may call a function of one of these names; True where unknown.

    Args:
        value: a network.
        names: of functions of PyTorch.
    """
    return _may(value, names, set())


def _may(value: Any, names: frozenset[str], seen: set[int]) -> bool:
    kind = type(value)
    if kind in PLAIN or isinstance(value, Tensor) or id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, Mapping):
        return any(_may(part, names, seen) for part in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_may(part, names, seen) for part in value)
    if isinstance(value, ModuleType):
        return not is_fixed(value.__name__)
    if isinstance(value, FunctionType):
        return _function(value, names, seen)
    if isinstance(value, type):
        return _class(value, names, seen)
    if isinstance(value, MethodType):
        return _may(value.__func__, names, seen) or _may(value.__self__, names, seen)
    if isinstance(value, partial):
        return any(_may(part, names, seen) for part in (value.func, value.args, value.keywords))
    if isinstance(value, BuiltinFunctionType):
        return value.__name__ in names
    if not hasattr(value, "__dict__"):
        return True
    return _may(kind, names, seen) or any(_may(part, names, seen) for part in vars(value).values())


_PARTS = (Mapping, list, tuple, set, frozenset, type, partial, BuiltinFunctionType)  # attributes of classes
_LIBRARY: WeakKeyDictionary[type, dict[frozenset[str], bool]] = WeakKeyDictionary()  # its classes, read once


def _class(kind: type, names: frozenset[str], seen: set[int]) -> bool:
    # The user's are read anew each time, because globals may have others by now.
    return any(_of_library(cls, names) if is_fixed(cls.__module__) else _own(cls, names, seen) for cls in kind.__mro__)


def _of_library(cls: type, names: frozenset[str]) -> bool:
    known = _LIBRARY.setdefault(cls, {})
    if names not in known:
        known[names] = False  # of a class that leads back to itself
        known[names] = any(_function(function, names, set()) for _, function in functions_in(cls))
    return known[names]


def _own(cls: type, names: frozenset[str], seen: set[int]) -> bool:
    parts = (part for part in vars(cls).values() if isinstance(part, _PARTS))
    return any(_function(function, names, seen) for _, function in functions_in(cls)) or any(
        _may(part, names, seen) for part in parts
    )


def _function(function: FunctionType, names: frozenset[str], seen: set[int]) -> bool:
    read = names_of(function.__code__)
    if function.__name__ in names or names.intersection(read):
        return True
    if is_fixed(function.__module__):
        return False
    if _BY_NAME.intersection(read):
        return True
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    variables = [function.__globals__[name] for name in read if name in function.__globals__]
    return any(_may(part, names, seen) for part in (*cells, *variables, *(function.__defaults__ or ())))
