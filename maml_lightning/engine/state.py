"""The Python objects that functions of tensors depend on: whether they are still what they were, and putting them back.

The first time that a function runs, it may turn out that it has to run in another way. Until that is known nothing
may have happened: attributes and random states are put back.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maml_lightning.engine.fingerprints import fingerprint

_CONTAINERS = (dict, OrderedDict, list, set)


class State:
    """The objects that functions depend on beside their tensors, as they are when this is made.

    Args:
        objects: the first argument of those functions, a tuple.
        key: their fingerprint.
        number: equal for equal states of one executor; None for one of too many, which is not traced.
    """

    def __init__(self, objects: Any, key: Hashable, number: int | None) -> None:
        self.objects, self.key, self.number = objects, key, number
        modules = [part for part in objects if isinstance(part, nn.Module)]
        self.network = tuple((id(module), module.training) for module in modules)  # the same for all its states

    def bind(self, function: Callable) -> "Bound":
        """``function`` with these objects as its first argument."""
        return Bound(function, self)


class Bound:
    """A function of tensors that depends on a :class:`State`."""

    def __init__(self, function: Callable, state: State) -> None:
        self.function, self.state = function, state

    def __call__(self, *args: Any) -> Any:
        return self.function(self.state.objects, *args)


def without_state(function: Callable) -> Bound:
    """A function that depends on tensors alone, in the form of those that depend on more."""
    return State((), fingerprint(()), 0).bind(lambda _, *args: function(*args))


class RandomState:
    """The current state of torch's random numbers, so that a recomputed function draws the same (dropout)."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]
        return all(torch.equal(a, b) for a, b in zip(self.states, now, strict=True))

    def restore(self) -> None:
        """Draw the same numbers again."""
        torch.set_rng_state(self.states[0])
        for device, state in zip(self.devices, self.states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers again for a while."""
        with torch.random.fork_rng(self.devices):
            self.restore()
            yield


class Snapshot:
    """What running a function may change: attributes of modules, and Python's and NumPy's random states.

    Args:
        state: of the function; modules among its objects count.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.random, self.numpy, self.drawn = random.getstate(), np.random.get_state(), _draws()
        self.modules = [(layer, dict(vars(layer))) for layer in modules_of(state.objects)]
        self.buffers = [
            (buffer, buffer._version, buffer.detach().clone())
            for layer, _ in self.modules
            for buffer in layer._buffers.values()
            if buffer is not None and not buffer.is_inference()
        ]
        self.containers = [
            (value, value.copy())
            for _, attributes in self.modules
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]

    def changes(self) -> str:
        """What has changed since, in words that follow "it"; empty for nothing."""
        if _draws() != self.drawn:
            return "draws from Python's or NumPy's random numbers"
        if any(buffer._version != version for buffer, version, _ in self.buffers) or self._reassigned():
            return "writes to its buffers as it runs"
        if fingerprint(self.state.objects) != self.state.key:
            return "changes its own attributes as it runs"
        return ""

    def _reassigned(self) -> bool:
        own = (buffer for layer, _ in self.modules for buffer in layer._buffers.values() if buffer is not None)
        known = {id(buffer) for buffer, *_ in self.buffers}
        return any(id(buffer) not in known for buffer in own if not buffer.is_inference())

    def restore(self) -> None:
        """Put everything back."""
        random.setstate(self.random)
        np.random.set_state(self.numpy)
        for layer, attributes in self.modules:
            vars(layer).clear()
            vars(layer).update(attributes)
        for container, values in self.containers:
            container.clear()
            container.extend(values) if isinstance(container, list) else container.update(values)
        with torch.no_grad():
            for buffer, version, value in self.buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _draws() -> Hashable:
    drawn: Any = np.random.get_state()
    return random.getstate(), drawn[1].tobytes(), drawn[2]


@contextmanager
def without_effects(net: nn.Module) -> Iterator[None]:
    """Put back what running a network changes."""
    state = State((net,), fingerprint((net,)), None)
    snapshot = Snapshot(state)
    try:
        yield
    finally:
        if snapshot.changes():
            snapshot.restore()


def modules_of(objects: tuple) -> list[nn.Module]:
    """All layers of the modules among the objects."""
    return [layer for part in objects if isinstance(part, nn.Module) for layer in part.modules()]


def copies_of_stored(net: nn.Module) -> dict[int, Tensor]:
    """A memo for ``copy.deepcopy``, which cannot copy tensors with a graph: those that layers keep (activations)."""
    stored = (value for layer in net.modules() for attribute in vars(layer).values() for value in _tensors(attribute))
    return {id(value): value.detach().clone() for value in stored if value.grad_fn is not None}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (dict, list, tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
