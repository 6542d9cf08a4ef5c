"""What a function depends on beside its tensors, as one hashable value: a trace is valid only while it stays the same.

A trace remembers the Python that ran: modes, attributes, layers, the class attributes and global variables that their
code reads. Two networks with equal fingerprints compute the same function of parameters, buffers and inputs; parameters
and buffers are therefore left out, but for their names.
"""

import os
import random
import sys
import sysconfig
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}
_FIXED = {"torch", "torchvision", "numpy", "maml_lightning", *sys.stdlib_module_names} - {"__main__"}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
# Their objects hold much that has nothing to do with what a network computes.
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "logging", "threading", "builtins"}
_SMALL = 64  # numbers of a tensor that is compared by value: its `.data` may change without a new version
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
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


def fingerprint(objects: tuple) -> Hashable:
    """Equal for what computes the same, different after a change of modes, attributes, layers or hooks.

    Args:
        objects: the network first, whose own parameters and buffers count by name alone, for they are arguments. All
            else counts by what is in it: modules, functions, containers, the attributes of objects; tensors and arrays
            by identity, version and, where they are small, values; objects of libraries by identity.
    """
    owner = next((part for part in objects[:1] if isinstance(part, nn.Module)), None)
    arguments = set() if owner is None else {id(value) for value in (*owner.parameters(), *owner.buffers())}
    return _of(objects, _Seen(arguments))


def has_hooks(value: Any) -> bool:
    """Whether a module among ``value``'s parts has hooks, which run at each call and not in a replay."""
    modules = (layer for part in value if isinstance(part, nn.Module) for layer in part.modules())
    if any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS):
        return True
    return any(getattr(layer, name) for layer in modules for name in _HOOKS)


class _Seen(dict[int, int]):
    """The objects that one fingerprint has met, and the tensors that are arguments."""

    def __init__(self, arguments: set[int]) -> None:
        super().__init__()
        self.arguments = arguments

    def first_time(self, value: Any) -> bool:
        """Whether the object was not met before."""
        return self.setdefault(id(value), len(self)) == len(self) - 1


def _of(value: Any, seen: _Seen) -> Hashable:
    kind: Any = type(value)
    if kind in _PLAIN:
        return value if kind is str else (kind, value)  # 1 == 1.0 == True
    if isinstance(value, tuple):
        return (kind, *[_of(v, seen) for v in value])
    if not seen.first_time(value):
        return ("seen", seen[id(value)])
    if isinstance(value, nn.Module):
        return _module(value, seen)
    if isinstance(value, Mapping):
        return (kind, *[(_of(k, seen), _of(v, seen)) for k, v in value.items()])
    if isinstance(value, list | deque):
        return (kind, *[_of(v, seen) for v in value])
    if isinstance(value, set | frozenset):
        return (kind, frozenset(_of(v, seen) for v in value))
    if kind is partial:
        return (kind, _of(value.func, seen), _of(value.args, seen), _of(value.keywords, seen))
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, zlib.crc32(value.tobytes()))
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, MethodType):
        return (_of(value.__func__, seen), _of(value.__self__, seen))
    if (state := generator_state(value)) is not None:
        return state
    if isinstance(value, type):
        return (
            _identity(value) if _is_installed(value.__module__) else (_identity(value), *_class(value, seen, met=True))
        )
    return _object(value, seen)


def _object(value: Any, seen: _Seen) -> Hashable:
    if is_of_library(value):
        return (_identity(value), *[(n, type(v), v) for n, v in attributes_of(value).items() if type(v) in _PLAIN])
    if isinstance(value, Iterator):
        return object()  # whoever takes its next element changes it
    parts = [(name, _of(v, seen)) for name, v in attributes_of(value).items()]
    return (type(value) if is_dataclass(value) else _identity(value), *_class(type(value), seen), *parts)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included."""
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def is_of_library(value: Any) -> bool:
    """Whether an object belongs to a library, and holds much that has nothing to do with what a network computes."""
    return _root(type(value).__module__) in _LIBRARIES and not isinstance(value, nn.Module)


def is_users(function: FunctionType) -> bool:
    """Whether a function is of the user's own code."""
    return not _is_installed(function.__module__)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _tensor(value: Tensor) -> Hashable:
    version = None if value.is_inference() else value._version
    small = value.device.type == "cpu" and value.layout is torch.strided and value.numel() <= _SMALL
    return (_identity(value), version, value.tolist().__repr__() if small and type(value) in _TENSORS else None)


def generator_state(value: Any) -> Hashable | None:
    """The state of a generator of random numbers; None for what is none."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    return bytes(value.get_state().numpy()) if isinstance(value, torch.Generator) else None


def _module(net: nn.Module, seen: _Seen) -> Hashable:
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
            arguments = seen.arguments
            parts.append(tuple([(n, v if v is None else id(v) in arguments or _tensor(v)) for n, v in value.items()]))
        else:
            parts.append(_of(value, seen))
    return tuple(parts)


def _class(kind: type, seen: _Seen, met: bool = False) -> list[Hashable]:
    """The attributes of a class, and what its methods depend on; once in a fingerprint."""
    if not met and not seen.first_time(kind):
        return []
    own = [cls for cls in kind.__mro__ if _root(cls.__module__) not in _FIXED]
    attributes = [(n, _code_of(v)) for cls in own for n, v in vars(cls).items()]
    data = _PLAIN | _CONTAINERS | {Tensor}
    read = [(n, v) for n, v in attributes if type(v) is FunctionType or (type(v) in data and not n.startswith("__"))]
    return [(n, _of(v, seen)) for n, v in read if type(v) is not FunctionType or not _is_installed(v.__module__)]


def _code_of(attribute: Any) -> Any:
    """The function of a method or property of any kind; other attributes as they are."""
    for name in ("__func__", "fget", "func"):
        if isinstance(found := getattr(attribute, name, None), FunctionType):
            return found
    return attribute


def _function(function: FunctionType, seen: _Seen) -> Hashable:
    """A function by identity, what it closes over, and the global variables that its code reads."""
    defaults = _of((function.__defaults__, function.__kwdefaults__), seen)
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    if _is_installed(function.__module__):
        return (_identity(function), defaults, *[_of(value, seen) for value in cells])
    names, variables = _names(function.__code__), function.__globals__
    read = [(name, variables[name]) for name in names if name in variables]
    for name, value in list(read):  # `settings.temperature`: a variable of another module
        if isinstance(value, ModuleType) and not _is_installed(value.__name__):
            read += [(f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value)]
    read = [(name, value) for name, value in read if not isinstance(value, ModuleType)]
    environment = hash(frozenset(os.environ.items())) if {"environ", "getenv"} & set(names) else None
    parts = [*[_of(value, seen) for value in cells], *[(n, _of(v, seen)) for n, v in read]]
    return (_identity(function), defaults, environment, *parts)


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
