"""The Python objects that functions of tensors depend on, and the random numbers that they draw."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from maml_lightning.devices import random_states, set_random_states
from maml_lightning.engine.fingerprints import fingerprint
from maml_lightning.engine.trials import Trial

_TIMES = itertools.count()


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
        self.time = next(_TIMES)  # in the order of meta-steps, each of which makes one
        self._trial: Trial | None = None

    def trial(self) -> Trial:
        """Copies to run, made once."""
        if self._trial is None:
            self._trial = Trial(self.objects)
        return self._trial

    def is_recurrent(self) -> bool:
        """Whether a layer is an RNN, GRU or LSTM."""
        modules = (module for part in self.objects if isinstance(part, nn.Module) for module in part.modules())
        return any(isinstance(module, nn.RNNBase) for module in modules)

    def bind(self, function: Callable) -> "Bound":
        """``function`` with these objects as its first argument."""
        return Bound(function, self)


class Bound:
    """A function of tensors that depends on a :class:`State`."""

    def __init__(self, function: Callable, state: State) -> None:
        self.function, self.state = function, state

    def __call__(self, *args: Any) -> Any:
        return self.function(self.state.objects, *args)


def bound(function: Callable) -> Bound:
    """The function itself if it has a state; one that depends on tensors alone, in the same form."""
    if isinstance(function, Bound):
        return function
    return State((), fingerprint(()), 0).bind(lambda _, *args: function(*args))


class RandomState:
    """The current state of torch's random numbers, so that a recomputed function draws the same (dropout)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.states = device, random_states(device)

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = random_states(self.device)
        return all(torch.equal(a, b) for a, b in zip(self.states, now, strict=True))

    def restore(self) -> None:
        """Draw the same numbers again."""
        set_random_states(self.device, self.states)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers again for a while."""
        before = random_states(self.device)
        self.restore()
        try:
            yield
        finally:
            set_random_states(self.device, before)
