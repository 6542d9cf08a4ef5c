"""Running a network to see what it does: on copies, so that nothing has happened to the network itself.

The first time that a function runs, it may turn out that it has to run in another way, or once more. Parameters are
shared by the copies, which do not write to them. While a copy runs, the variables that its code reads are copies, too.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn

from maml_lightning.devices import has_values, random_states, set_random_states
from maml_lightning.engine.caches import emptied
from maml_lightning.engine.fingerprints import attributes_of, fingerprint, is_of_library, variables_of
from maml_lightning.engine.outside import calls_outside
from maml_lightning.engine.variables import Cache, Manager, Variable, ingredients, is_fixed, is_installed, own_classes
from maml_lightning.errors import SettingError


class Trial:
    """Copies of objects, and whether running them changes them.

    Args:
        objects: a tuple, the network first.

    Raises:
        Exception: they cannot be copied; whatever a part of them raises.
    """

    def __init__(self, objects: Any) -> None:
        self.objects, self.variables = _copied(objects, variables_of(objects))
        with replaced(self.variables):
            self.key, self.draws = fingerprint(self.objects), _draws()
        self.buffers = self._buffers()

    def run(self, function: Callable[[Any], Any]) -> tuple[Any, str]:
        """What ``function`` gives of the copies, and what it changes, in words that follow "it"; empty for nothing.

        Python's and NumPy's random numbers are put back.
        """
        with same_random_numbers(), replaced(self.variables):
            return function(self.objects), self._changes()

    def watch(self, function: Callable[[Any], Any]) -> tuple[Any, str]:
        """The same; and what it asks of the world outside counts, too."""
        with calls_outside() as found:
            result, changes = self.run(function)
        return result, changes or next(iter(found), "")

    def _buffers(self) -> list[Tensor]:
        modules = (part for part in self.objects if isinstance(part, nn.Module))
        return [buffer.detach().clone() for module in modules for buffer in module.buffers()]

    def _changes(self) -> str:
        if _draws() != self.draws:
            return "draws from Python's or NumPy's random numbers"
        buffers = self._buffers()
        if len(buffers) != len(self.buffers) or not all(map(same, buffers, self.buffers)):
            return "writes to its buffers as it runs"
        return "" if fingerprint(self.objects) == self.key else "changes its own attributes or variables as it runs"


@contextmanager
def replaced(variables: list[tuple[Variable, Any]]) -> Iterator[None]:
    """Other values of variables for a while; afterwards all are as before, and new ones are gone.

    Args:
        variables: with the other value of each.
    """
    owners = list({id(variable.owner): variable.owner for variable, _ in variables}.values())
    before = [set(_names(owner)) for owner in owners]
    try:
        for variable, value in variables:
            variable.set(value)
        yield
    finally:
        for variable, _ in variables:
            variable.set(variable.value)
        for owner, names in zip(owners, before, strict=True):
            for name, value in list(_names(owner).items()):
                # Modules are imported for all time; what torch.compile makes refers to the variables that it adds.
                lasting = isinstance(value, ModuleType) or name.startswith("__")
                if name not in names and not lasting:
                    owner.pop(name) if isinstance(owner, dict) else delattr(owner, name)


def _names(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values; those that are no number are alike."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout or not has_values(a):
        return a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
    if a.layout is not torch.strided:  # sparse tensors are not compared element by element
        a, b = a.to_dense(), b.to_dense()
    return bool(((a == b) | ((a != a) & (b != b))).all())


class _Copies(dict[int, Any]):
    """The memo of ``copy.deepcopy``, in which a weak reference to a layer becomes one to the layer's copy."""

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        if isinstance(found, ReferenceType) and isinstance(layer := found(), nn.Module):
            return ref(copy.deepcopy(layer, self))
        return found


def _copied(
    objects: Any,
    variables: list[Variable],
    share_parameters: bool = True,
    follows: Callable[[Any], bool] = lambda value: True,
) -> tuple[Any, list[tuple[Variable, Any]]]:
    """Deep copies of a tuple and of variables' values, which share the objects of libraries.

    Args:
        objects: a tuple.
        variables: those without a copy stay as they are.
        share_parameters: whether the copies have the same parameters.
        follows: whether to copy a function with what it closes over, and an object not as its class says.
    """
    memo = _Copies()
    begun: list[tuple[Any, Any]] = []  # with what they are copies of
    managers: list[tuple[Manager, tuple]] = []
    caches: list[Any] = []
    for value in _reachable((objects, [each.value for each in variables])):
        if isinstance(value, Tensor):
            if share_parameters and isinstance(value, nn.Parameter):
                memo[id(value)] = value
            elif value.grad_fn is not None:  # such as stored activations, which deepcopy refuses
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
        elif _is_shared(value):
            memo[id(value)] = value
        elif isinstance(value, FunctionType) and value.__closure__ and not is_fixed(value.__module__):
            if follows(value):
                memo[id(value)] = copied = _function_like(value)
                begun.append((value, copied))
        elif isinstance(value, Manager) and (made_of := ingredients(value)) is not None:  # generators have no copies
            memo[id(value)] = manager = type(value)(*made_of)
            managers.append((manager, made_of))
        elif isinstance(value, Cache):
            caches.append(value)
        elif _copies_itself(type(value)) and follows(value):
            memo[id(value)] = copied = object.__new__(type(value))
            begun.append((value, copied))
    for kept in caches:
        memo[id(kept)] = emptied(kept, memo.get(id(kept.__wrapped__), kept.__wrapped__))
    for original, copied in begun:
        _complete(copied, original, memo)
    for manager, made_of in managers:
        vars(manager).update(vars(type(manager)(*(_copy(part, memo) for part in made_of))))
    parts, changed = [_copy(part, memo) for part in objects], _changed(variables, memo)
    if _has_layers_of(objects, (parts, [value for _, value in changed])):
        raise TypeError("a part of it refers to its layers, not to their copies, such as a weak dictionary")
    return type(objects)._make(parts) if hasattr(objects, "_fields") else (*parts,), changed


def _flattened(copies: Any) -> Any:
    """Copies with their own weights; those of recurrent layers in one piece, else each call on a GPU warns."""
    for part in copies:
        for layer in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()
    return copies


def _changed(variables: list[Variable], memo: dict[int, Any]) -> list[tuple[Variable, Any]]:
    """Variables with copies of their values, where that makes a difference."""
    others = {
        (id(variable.owner), variable.name): (variable, _copy_or_own(variable.value, memo)) for variable in variables
    }
    return [
        (v, value)
        for v, value in others.values()
        if value is not v.value or isinstance(v.owner, dict | type | ContextVar)
    ]


def _copies_itself(kind: type) -> bool:
    """Whether the user says how objects of a class are copied: without their caches, say, or not at all."""
    ways = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")
    if kind.__new__ is not object.__new__:
        return False
    return any(name in vars(cls) for cls in own_classes(kind) if not is_installed(cls.__module__) for name in ways)


def _complete(copied: Any, original: Any, memo: dict[int, Any]) -> None:
    """Give a copy copies of its original's attributes; of a function, of what it closes over and its defaults, too."""
    if not isinstance(original, FunctionType):
        vars(copied).update({name: _copy_or_own(part, memo) for name, part in vars(original).items()})
        return
    for cell, own in zip(original.__closure__ or (), copied.__closure__ or (), strict=True):
        if cell != CellType():
            own.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    copied.__defaults__, copied.__kwdefaults__, own_attributes = (
        _copy(part, memo) for part in (original.__defaults__, original.__kwdefaults__, vars(original))
    )
    vars(copied).update(own_attributes)


def _function_like(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    copied.__module__, copied.__qualname__ = function.__module__, function.__qualname__
    return copied


def _has_layers_of(objects: Any, value: Any) -> bool:
    """Whether a value is made of layers of the networks among objects, beside others."""
    layers = {id(layer) for part in objects if isinstance(part, nn.Module) for layer in part.modules()}
    return any(id(part) in layers for part in _reachable(value))


def _is_shared(value: Any) -> bool:
    if type(value) in (object, ReferenceType) or (isinstance(value, ModuleType) and is_fixed(value.__name__)):
        return True
    return is_of_library(value) and type(value).__module__.partition(".")[0] not in ("builtins", "numpy")


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    # Some versions of Python copy no function, not even one that is in the memo.
    return memo[id(value)] if id(value) in memo else copy.deepcopy(value, memo)


def _copy_or_own(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return _copy(value, memo)
    except Exception:  # whatever a part of it raises
        return value


@contextmanager
def trying(*objects: Any, device: torch.device) -> Iterator[Any]:
    """Copies to run for their results alone, and copies of the variables that their code reads in the place of those.

    Where they have no copies, they are tried themselves. Random numbers are put back afterwards.

    Args:
        objects: the network first.
        device: of the tensors that they are run with.
    """
    try:
        copies, variables = _copied(objects, variables_of(objects), share_parameters=False)
        _flattened(copies)
    except Exception:  # whatever a part of them raises
        copies, variables = objects, []
    with same_random_numbers(device), replaced(variables):
        yield copies


def copy_of(net: nn.Module) -> nn.Module:
    """A copy of a network, with copies of the functions and objects that call its layers; others are as in any copy.

    Raises:
        SettingError: it has no copy that is apart from it.
    """
    try:
        return _flattened(_copied((net,), [], False, lambda value: _has_layers_of((net,), value))[0])[0]
    except Exception as error:  # whatever a part of it raises
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(
            f"model.net cannot be copied ({why}), but an adapted network is a copy: let it hold its layers as "
            "attributes, or take the outputs of adapted networks from trajectory."
        ) from error


@contextmanager
def same_random_numbers(device: torch.device | None = None) -> Iterator[None]:
    """Put Python's and NumPy's random numbers back afterwards; with a device, torch's on it and on the CPU, too."""
    states = random.getstate(), np.random.get_state()
    of_torch = [] if device is None else random_states(device)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if device is not None:
            set_random_states(device, of_torch)


def _reachable(objects: Any) -> Iterator[Any]:
    """All that objects are made of; what belongs to libraries as a whole."""
    seen: set[int] = set()
    stack = [objects]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        yield value
        stack += _parts(value)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if (made_of := ingredients(value)) is not None:
        return list(made_of)
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, ReferenceType):
        return [value()]
    if isinstance(value, FunctionType):
        cells = value.__closure__ or () if not is_fixed(value.__module__) else ()
        return [cell.cell_contents for cell in cells if cell != CellType()]
    if isinstance(value, Tensor) or is_of_library(value):
        return []
    return list(attributes_of(value).values())


def _draws() -> Hashable:
    drawn: Any = np.random.get_state()
    return random.getstate(), drawn[1].tobytes(), drawn[2]
