"""What a function depends on beside its tensors, as one hashable value: a trace is valid only while it stays the same.

A trace remembers the Python that ran: modes, attributes, layers, the class attributes and global variables that their
code reads. Two networks with equal fingerprints compute the same function of parameters, buffers and inputs; parameters
and buffers are therefore left out, but for their names.
"""

import os
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from types import BuiltinMethodType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from maml_lightning.engine.values import all_plain, checksum, generator_state, identity, of_tensor, plain
from maml_lightning.engine.variables import (
    LIGHTNING,
    PLAIN,
    Variable,
    functions_of,
    ingredients,
    is_installed,
    of_class,
    read_by,
    reads_of,
)

_CONTAINERS = {dict, OrderedDict, list, tuple, set}
# Their objects hold much that has nothing to do with what a network computes.
_LIBRARIES = {
    *("torch", *LIGHTNING, "numpy", "logging", "threading", "builtins"),
    "maml_lightning",  # what keeps fingerprints would grow with each that it is part of
}
_MANY = 64  # values of a container that are compared as a whole
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DERIVED = {"_flat_weights", "_flat_weight_refs"}  # recurrent layers derive them from their parameters at each call


class _Hashed:
    """A value whose hash is computed once."""

    __slots__ = ("hash", "value")

    def __init__(self, value: Hashable) -> None:
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.hash == other.hash and self.value == other.value

    def __repr__(self) -> str:
        return repr(self.value)


def fingerprint(objects: tuple) -> Hashable:
    """Equal for what computes the same, different after a change of modes, attributes, layers or hooks.

    Args:
        objects: the network first, whose own parameters and buffers count by name alone, for they are arguments. All
            else counts by what is in it: modules, functions, containers, the attributes of objects; tensors and arrays
            by identity, version and, where they are small, values; objects of libraries by identity.
    """
    seen = _Seen(objects)
    try:
        return _Hashed((_of(objects, seen), *_global_hooks(seen), *_progress(seen), *_of_torch(seen)))
    except RecursionError:  # of objects nested too deeply to compare
        return object()


def variables_of(objects: tuple) -> list[Variable]:
    """The variables of all code that objects have, see :func:`fingerprint`."""
    _of(objects, seen := _Seen(objects))
    return seen.variables


def has_hooks(value: Any) -> bool:
    """Whether a module among ``value``'s parts has hooks, which run at each call and not in a replay."""
    modules = (layer for part in value if isinstance(part, nn.Module) for layer in part.modules())
    if any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS):
        return True
    return any(getattr(layer, name) for layer in modules for name in _HOOKS)


def needs_loop(objects: tuple) -> str:
    """Why objects can run in a loop over tasks alone; empty where they may run in other ways."""
    if has_hooks(objects):
        return "its hooks have to run at each call"
    layers = [pair for part in objects if isinstance(part, nn.Module) for pair in part.named_modules()]
    script = next(((n, layer) for n, layer in layers if isinstance(layer, torch.jit.ScriptModule)), None)
    if script is None:
        return ""
    name = script[0] or type(script[1]).__name__
    return f"TorchScript in it ({name}) runs task by task alone; give the module that it was made of"


class _Seen(dict[int, int]):
    """The objects that one fingerprint has met.

    Args:
        objects: its arguments.
    """

    def __init__(self, objects: tuple) -> None:
        super().__init__()
        owners = [part for part in objects[:1] if isinstance(part, nn.Module)]
        self.arguments = {id(value) for net in owners for value in (*net.parameters(), *net.buffers())}
        self.names: set[str] = set()  # that code reads
        self.variables: list[Variable] = []
        self.of_libraries: list[Any] = []

    def first_time(self, value: Any) -> bool:
        """Whether the object was not met before."""
        number = len(self)
        return self.setdefault(id(value), number) == number


def _of(value: Any, seen: _Seen) -> Hashable:
    kind: Any = type(value)
    if kind in PLAIN:
        return value if kind is str else plain(value)
    if kind in _CONTAINERS and len(value) > _MANY and (flat := all_plain(value)) is not None:
        return (kind, *flat)
    if isinstance(value, tuple):
        return (kind, *[_of(v, seen) for v in value], *_of_kind(value, seen))
    if not seen.first_time(value):
        return ("seen", seen[id(value)])
    if kind is FunctionType:
        return _function(value, seen)
    if isinstance(value, nn.Module):
        return _module(value, seen)
    if isinstance(value, Mapping):
        return (kind, *[(_of(k, seen), _of(v, seen)) for k, v in value.items()], *_of_kind(value, seen))
    if isinstance(value, list | deque):
        return (kind, *[_of(v, seen) for v in value], *_of_kind(value, seen))
    if isinstance(value, set | frozenset):
        return (kind, frozenset(_of(v, seen) for v in value), *_of_kind(value, seen))
    if (made_of := ingredients(value)) is not None:
        return (kind, *[_of(part, seen) for part in made_of])
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return (value.shape, value.dtype.str, _of((*value.ravel().tolist(),), seen))
    if isinstance(value, MethodType):
        return (_of(value.__func__, seen), _of(value.__self__, seen))
    if isinstance(value, BuiltinMethodType | MethodWrapperType):
        return (value.__name__, _of(value.__self__, seen))
    if isinstance(value, weakref.ReferenceType):
        return (kind, _of(value(), seen))
    if isinstance(value, ContextVar):
        unset = object()
        now = value.get(unset)
        return (identity(value), *_values([Variable(value, value.name, now)] if now is not unset else [], seen))
    if (state := generator_state(value)) is not None:
        return state
    if isinstance(value, type):
        return identity(value) if is_installed(value.__module__) else (identity(value), *_class(value, seen, met=True))
    return _object(value, seen)


def _object(value: Any, seen: _Seen) -> Hashable:
    if isinstance(value, ModuleType):
        return identity(value)
    if (content := checksum(value)) is not None:
        return (type(value), content)
    if isinstance(value, Iterator) and (type(value).__module__ == "builtins" or not is_of_library(value)):
        return object()  # whoever takes its next element changes it
    if isinstance(value, staticmethod | classmethod):
        return (identity(value), _of(value.__func__, seen))
    if isinstance(value, property):
        return (identity(value), _of(value.fget, seen))
    if is_of_library(value):
        seen.of_libraries.append(value)
        return (identity(value), *_of_library(value))
    parts = [(name, _of(v, seen)) for name, v in attributes_of(value).items()]
    return (type(value) if is_dataclass(value) else identity(value), *_class(type(value), seen), *parts)


def _of_library(value: Any) -> list[Hashable]:
    """The attributes that are plain or tensors: the scale of a distribution."""
    attributes = attributes_of(value).items()
    own = [(name, plain(v)) for name, v in attributes if type(v) in PLAIN]
    return [*own, *[(name, of_tensor(v)) for name, v in attributes if isinstance(v, Tensor)]]


def _plain_part(value: Any) -> Hashable:
    """What is plain in lists and dictionaries in one another: the rates in an optimizer's ``param_groups``."""
    if isinstance(value, dict):
        return (*[(name, _plain_part(v)) for name, v in value.items() if isinstance(name, str)],)
    if isinstance(value, list | tuple):
        return (*map(_plain_part, value),)
    return plain(value) if type(value) in PLAIN else None


def _of_kind(value: Any, seen: _Seen) -> list[Hashable]:
    """Of a container of the user's own kind: its attributes, and what its class depends on."""
    kind = type(value)
    if kind in _CONTAINERS or is_installed(kind.__module__):
        return []
    return [*_class(kind, seen), *[(name, _of(v, seen)) for name, v in attributes_of(value).items()]]


def _global_hooks(seen: _Seen) -> list[Hashable]:
    hooks = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
    return [_of(own, seen) for own in hooks if own]


def _of_torch(seen: _Seen) -> list[Hashable]:
    """PyTorch's own settings that its operators and code may ask for, and the user's modes: a graph keeps them."""
    settings = (torch.get_default_device(), torch.get_float32_matmul_precision(), torch.get_num_threads())
    modes = [_of(mode, seen) for mode in _get_current_function_mode_stack() if not is_of_library(mode)]
    return [torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), *settings, *modes]


def _progress(seen: _Seen) -> list[Hashable]:
    """What code reads that objects of libraries have: epoch and step of a Trainer, rates of an optimizer."""
    objects, parts = list(seen.of_libraries), list[Hashable]()
    for value in objects:  # grows: `trainer.fit_loop.batch_idx`
        lightning = type(value).__module__.partition(".")[0] in LIGHTNING
        for name in sorted(seen.names) if lightning else seen.names & {"param_groups", "defaults"}:
            with suppress(Exception):  # whatever a property raises; where code reads it, it will again
                parts.append((name, _plain_part(part := getattr(value, name))))
                inner = [each for each in (part if type(part) is list else [part]) if is_of_library(each)]
                objects += [each for each in inner if not any(each is known for known in objects)]
    return parts


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included."""
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def is_of_library(value: Any) -> bool:
    """Whether an object belongs to a library, and holds much that has nothing to do with what a network computes."""
    return type(value).__module__.partition(".")[0] in _LIBRARIES and not isinstance(value, nn.Module)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _module(net: nn.Module, seen: _Seen) -> Hashable:
    attributes = vars(net)
    parts: list[Any] = [type(net), *_class(type(net), seen), *attributes]
    for name, value in attributes.items():
        kind = type(value)
        if kind in PLAIN:
            parts.append(value if kind is str else plain(value))
        elif kind in _CONTAINERS and not value:  # most are: no hooks, no buffers
            parts.append(kind)
        elif name in _DERIVED:
            continue
        elif name in ("_parameters", "_buffers"):
            arguments = seen.arguments
            parts.append(tuple([(n, v if v is None else id(v) in arguments or of_tensor(v)) for n, v in value.items()]))
        else:
            parts.append(_of(value, seen))
    return tuple(parts)


def _class(kind: type, seen: _Seen, met: bool = False) -> list[Hashable]:
    """The attributes of a class, and what its functions depend on; once in a fingerprint."""
    if not met and not seen.first_time(kind):
        return []
    return [*_values(of_class(kind), seen), *[(name, _of(function, seen)) for name, function in functions_of(kind)]]


def _function(function: FunctionType, seen: _Seen) -> Hashable:
    """A function by identity, what it closes over, and the variables that its code reads."""
    cells = [_of(cell.cell_contents, seen) for cell in function.__closure__ or () if cell != CellType()]
    names, _, _, has_environment = reads_of(function.__code__)
    environment: Hashable = hash(frozenset(os.environ.items())) if has_environment else None
    if not is_installed(function.__module__):
        seen.names.update(names)
    if function.__globals__.get("sys") is sys or "sys" in names:
        of_sys = sorted(vars(sys).keys() & names)
        environment = (environment, *[(name, repr(getattr(sys, name))) for name in of_sys if _is_plain_of_sys(name)])
    # Notebooks that reload edited files put other code in its place. References are compared faster than identities.
    own = weakref.ref(function), weakref.ref(function.__code__)
    return (*own, environment, *cells, *_values(read_by(function), seen))


def _is_plain_of_sys(name: str) -> bool:
    return name == "argv" or type(vars(sys)[name]) in PLAIN


def _values(variables: Iterable[Variable], seen: _Seen) -> list[Hashable]:
    parts: list[Hashable] = []
    for variable in variables:
        seen.variables.append(variable)
        _, name, value = variable
        kind: Any = type(value)
        if kind in PLAIN:
            parts += (name, plain(value))
        else:
            empty = kind in _CONTAINERS and not value
            parts += (name, kind if empty else _of(value, seen))
    return parts
