"""What a function depends on beside its tensors, as one hashable value: a trace is valid only while it stays the same.

A trace remembers the Python that ran: modes, attributes, layers, the class attributes and global variables that their
code reads. Two networks with equal fingerprints compute the same function of parameters, buffers and inputs; parameters
and buffers are therefore left out, but for their names.
"""

import sys
import sysconfig
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}
_FIXED = {"torch", "torchvision", "numpy", "maml_lightning", *sys.stdlib_module_names} - {"__main__"}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DERIVED = {"_flat_weights", "_flat_weight_refs"}  # recurrent layers derive them from their parameters at each call


class _Identity:
    """The identity of an object, which this does not keep alive."""

    def __init__(self, value: Any) -> None:
        self.of, self.hash = weakref.ref(value), id(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.of() is not None and self.of() is other.of()


def fingerprint(value: Any) -> Hashable:
    """Equal for what computes the same, different after a change of modes, plain attributes, layers or hooks.

    Args:
        value: modules, functions, partials, containers and dataclasses count by what is in them; other objects by
            their identity and the plain values among their attributes; tensors by identity and version.
    """
    return _of(value, {})


def has_hooks(value: Any) -> bool:
    """Whether a module among ``value``'s parts has hooks, which run at each call and not in a replay."""
    modules = (layer for part in value if isinstance(part, nn.Module) for layer in part.modules())
    if any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS):
        return True
    return any(getattr(layer, name) for layer in modules for name in _HOOKS)


def _of(value: Any, seen: dict[int, int]) -> Hashable:
    kind: Any = type(value)
    if kind in _PLAIN:
        return value if kind is str else (kind, value)  # 1 == 1.0 == True
    if isinstance(value, tuple):
        return (kind, *[_of(v, seen) for v in value])
    if (first := seen.setdefault(id(value), len(seen))) != len(seen) - 1:
        return ("seen", first)
    if isinstance(value, nn.Module):
        return _module(value, seen)
    if isinstance(value, Mapping):
        return (kind, *[(_of(k, seen), _of(v, seen)) for k, v in value.items()])
    if isinstance(value, list):
        return (kind, *[_of(v, seen) for v in value])
    if isinstance(value, set | frozenset):
        return (kind, frozenset(_of(v, seen) for v in value))
    if kind is partial:
        return (kind, _of(value.func, seen), _of(value.args, seen), _of(value.keywords, seen))
    if isinstance(value, Tensor):
        return (_identity(value), None if value.is_inference() else value._version)
    if isinstance(value, FunctionType):
        return _function(value, seen)
    attributes = getattr(value, "__dict__", {}) if not isinstance(value, type) else {}
    if is_dataclass(value) and not isinstance(value, type):
        return (kind, *[(n, _of(v, seen)) for n, v in attributes.items()])
    return (_identity(value), *[(n, type(v), v) for n, v in attributes.items() if type(v) in _PLAIN])


def _module(net: nn.Module, seen: dict[int, int]) -> Hashable:
    attributes = vars(net)
    parts: list[Any] = [type(net), *_class(type(net), seen), *attributes]
    for name, value in attributes.items():
        kind = type(value)
        if kind in _PLAIN:
            parts += (kind, value)
        elif kind in _CONTAINERS and not value:  # most are: no hooks, no buffers
            parts.append(kind)
        elif name in _DERIVED:
            continue
        elif name in ("_parameters", "_buffers"):
            parts.append(tuple([(n, v is None) for n, v in value.items()]))
        else:
            parts.append(_of(value, seen))
    return tuple(parts)


def _class(kind: type, seen: dict[int, int]) -> list[Hashable]:
    """The attributes of a class, and what its methods depend on; once in a fingerprint."""
    if seen.setdefault(id(kind), len(seen)) != len(seen) - 1:
        return []
    own = [cls for cls in kind.__mro__ if _root(cls.__module__) not in _FIXED]
    attributes = [(n, getattr(v, "__func__", v)) for cls in own for n, v in vars(cls).items() if not n.startswith("__")]
    read = [(n, v) for n, v in attributes if type(v) in (_PLAIN | _CONTAINERS | {FunctionType, Tensor})]
    return [(n, _of(v, seen)) for n, v in read if type(v) is not FunctionType or not _is_installed(v.__module__)]


def _function(function: FunctionType, seen: dict[int, int]) -> Hashable:
    """A function by identity, what it closes over, and the global variables that its code reads."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    if _is_installed(function.__module__):
        return (_identity(function), *[_of(value, seen) for value in cells])
    names, variables = _names(function.__code__), function.__globals__
    read = [(name, variables[name]) for name in names if name in variables]
    for name, value in list(read):  # `settings.temperature`: a variable of another module
        if isinstance(value, ModuleType) and not _is_installed(value.__name__):
            read += [(f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value)]
    read = [(name, value) for name, value in read if not isinstance(value, ModuleType | type)]
    return (_identity(function), *[_of(value, seen) for value in cells], *[(n, _of(v, seen)) for n, v in read])


@cache
def _names(code: CodeType) -> tuple[str, ...]:
    """The names that code reads, that of functions inside it included."""
    inner = (name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


@cache
def _is_installed(module: str | None) -> bool:
    """Whether a module is of an installed package, whose variables are not looked at, not of the user's own code."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return _root(module) in _FIXED or file.startswith(_INSTALLED)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _identity(value: Any) -> Hashable:
    try:
        return _Identity(value)
    except TypeError:  # no weak reference to it: a number of numpy's, an enumeration's member, a slice
        return (type(value), value if isinstance(value, Hashable) else id(value))
