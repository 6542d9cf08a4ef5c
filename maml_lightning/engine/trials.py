"""Running a network to see what it does: on copies, so that nothing has happened to the network itself.

The first time that a function runs, it may turn out that it has to run in another way, or once more. Parameters are
shared by the copies, which do not write to them; global variables are not copied.
"""

import copy
import random
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maml_lightning.engine.fingerprints import attributes_of, fingerprint, is_of_library
from maml_lightning.engine.variables import is_installed


class Trial:
    """Copies of objects, and whether running them changes them.

    Args:
        objects: a tuple, the network first.

    Raises:
        Exception: they cannot be copied; whatever a part of them raises.
    """

    def __init__(self, objects: Any) -> None:
        self.objects = trial_copy(objects)
        self.key, self.draws = fingerprint(self.objects), _draws()
        self.buffers = self._buffers()

    def _buffers(self) -> list[Tensor]:
        modules = (part for part in self.objects if isinstance(part, nn.Module))
        return [buffer.detach().clone() for module in modules for buffer in module.buffers()]

    def changes(self) -> str:
        """What running the copies has changed, in words that follow "it"; empty for nothing."""
        if _draws() != self.draws:
            return "draws from Python's or NumPy's random numbers"
        buffers = self._buffers()
        if len(buffers) != len(self.buffers) or not all(map(_same, buffers, self.buffers)):
            return "writes to its buffers as it runs"
        return "" if fingerprint(self.objects) == self.key else "changes its own attributes as it runs"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def trial_copy(objects: Any, share_parameters: bool = True) -> Any:
    """A deep copy of a tuple that shares the objects of libraries, and copies what functions close over.

    Args:
        objects: a tuple.
        share_parameters: whether the copies have the same parameters.
    """
    memo: dict[int, Any] = {}
    functions: list[tuple[FunctionType, FunctionType]] = []
    for value in _reachable(objects):
        if isinstance(value, Tensor):
            if share_parameters and isinstance(value, nn.Parameter):
                memo[id(value)] = value
            elif value.grad_fn is not None:  # such as stored activations, which deepcopy refuses
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, torch.Generator):
            memo[id(value)] = value.clone_state()
        elif is_of_library(value) and type(value).__module__.partition(".")[0] not in ("builtins", "numpy"):
            memo[id(value)] = value
        elif isinstance(value, FunctionType) and value.__closure__:
            cells = tuple(CellType() for _ in value.__closure__)
            copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            copied.__kwdefaults__, copied.__module__ = value.__kwdefaults__, value.__module__
            copied.__qualname__ = value.__qualname__
            memo[id(value)] = copied
            functions.append((value, copied))
    for original, copied in functions:
        for cell, own in zip(original.__closure__ or (), copied.__closure__ or (), strict=True):
            if cell != CellType():
                own.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    # Some versions of Python copy no function, not even one that is in the memo.
    parts = [memo[id(part)] if id(part) in memo else copy.deepcopy(part, memo) for part in objects]
    return (
        objects._replace(**dict(zip(objects._fields, parts, strict=True))) if hasattr(objects, "_fields") else (*parts,)
    )


def copies_to_try(*objects: Any) -> Any:
    """Copies to run for their results alone, see :func:`trial_copy`; the objects themselves where they have none."""
    try:
        return trial_copy(objects, share_parameters=False)
    except Exception:  # whatever a part of them raises
        return objects


def copies_of_stored(net: nn.Module) -> dict[int, Tensor]:
    """A memo for ``copy.deepcopy``, which cannot copy tensors with a graph: those that layers keep (activations)."""
    stored = (value for value in _reachable((net,)) if isinstance(value, Tensor) and value.grad_fn is not None)
    return {id(value): value.detach().clone() for value in stored}


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put Python's and NumPy's random numbers back afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = value.__closure__ or () if not is_installed(value.__module__) else ()
        return [cell.cell_contents for cell in cells if cell != CellType()]
    if isinstance(value, Tensor) or is_of_library(value):
        return []
    return list(attributes_of(value).values())


def _draws() -> Hashable:
    drawn: Any = np.random.get_state()
    return random.getstate(), drawn[1].tobytes(), drawn[2]
