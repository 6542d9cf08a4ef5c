"""Functions of tensors that a GPU replays as one graph: the whole meta-gradient of a meta-batch is one launch.

A function is run a few times as it is, then captured (:mod:`~maml_lightning.engine.cuda_graphs`) with its tensors in
memory of its own, which each call fills. The first replay is compared with the function itself, on the next call's
tensors. What cannot be captured, or differs, runs as before.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_lightning.devices import has_values, kernel_settings, no_random_numbers
from maml_lightning.engine.agreement import disagreement
from maml_lightning.engine.cuda_graphs import CAPTURERS, Captured, Capturer, Watch
from maml_lightning.engine.execution import Executor
from maml_lightning.engine.graphs import structure
from maml_lightning.engine.memory import out_of_memory
from maml_lightning.engine.recording import without_autocast_cache
from maml_lightning.engine.state import RandomState, State
from maml_lightning.engine.tracing import signature
from maml_lightning.engine.variables import PLAIN

log = logging.getLogger(__name__)
WARM_UP = 3  # calls of a function that run as it is, before it is captured
ATTEMPTS = 3  # to find it replaying recorded graphs alone
MAX_OPERATORS = 50_000  # of one graph; a function of more keeps a GPU busy anyway
MAX_CAPTURES = 4  # each keeps its inputs and outputs
IDLE_CALLS = 200  # after which a graph makes room for another
MAX_SIGNATURES = 64  # that are counted
_SAME = 0.1  # of the difference from a loop that rounding explains: the kernels are the same


class _Graph(NamedTuple):
    """A captured function: its inputs, which a call fills, and the structure of its results."""

    captured: Captured
    inputs: list[Tensor]
    spec: pytree.TreeSpec

    def __call__(self, tensors: list[Tensor]) -> Any:
        """The function's results, in memory of their own."""
        _copy(self.inputs, tensors)
        self.captured.replay()
        return pytree.tree_unflatten(_copies(self.captured.outputs), self.spec)


class _Entry:
    """What is known of calls of one signature."""

    def __init__(self) -> None:
        self.calls = self.attempts = self.last = 0
        self.graph: _Graph | None = None
        self.agrees = False
        self.why = ""  # it is not captured

    def give_up(self, why: str) -> None:
        """Do not capture it."""
        self.why = why
        self.release()
        log.debug("Not captured as a CUDA graph: %s", why)

    def release(self) -> None:
        """Free the graph; further calls may capture it anew."""
        graph, self.graph, self.agrees, self.calls = self.graph, None, False, 0
        if graph is not None:
            graph.captured.release()


class Captures:
    """Runs functions of tensors, captured where that is possible. Copies and pickles begin anew.

    Args:
        executor: runs what the functions consist of. Only what it replays from recorded graphs is captured, and only
            with ``execution`` auto, without a compiler.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._forget()

    def _forget(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._capturers: dict[torch.device, Capturer] = {}
        self._calls = 0
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"executor": self.executor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @torch.no_grad()
    def __call__(self, function: Callable[..., Any], key: Hashable, state: State, *args: Any) -> Any:
        """``function(*args)``, a pytree of tensors.

        Args:
            function: without effects. It depends on ``args``, ``key`` and ``state`` alone.
            key: equal for equal functions.
            state: of the objects that its parts depend on.
            args: pytrees of tensors and plain values.
        """
        if not self._is_traced(state):
            return function(*args)
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._possible(leaves, tensors):
            return function(*args)
        plain = tuple((type(leaf), leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        learned = tuple(tensor.requires_grad for tensor in tensors)
        entry = self._entry(
            (key, state.number, structure(spec), plain, learned, *signature(tensors), kernel_settings())
        )
        if entry.graph is not None:
            return entry.graph(tensors) if entry.agrees else self._compared(entry, function, args, tensors)
        entry.calls += 1
        if entry.why or entry.calls <= WARM_UP or not self._has_room():
            return self._run(function, args)
        return self._captured(entry, function, leaves, spec, tensors)

    def release(self) -> None:
        """Free all graphs."""
        for entry in self._entries.values():
            entry.release()

    def _is_traced(self, state: State) -> bool:
        executor = self.executor
        by_default = executor.execution == "auto" and not executor.compile
        return by_default and state.number is not None and executor.way(state) == "traced"

    def _possible(self, leaves: list[Any], tensors: list[Tensor]) -> bool:
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or next(iter(devices)).type not in CAPTURERS or self._failed:
            return False
        return all(type(leaf) in PLAIN or type(leaf) in (Tensor, nn.Parameter, nn.Buffer) for leaf in leaves)

    def _entry(self, key: Hashable) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        self._calls += 1
        entry.last = self._calls
        if len(self._entries) > MAX_SIGNATURES:
            self._entries.popitem(last=False)[1].release()
        return entry

    def _has_room(self) -> bool:
        captured = [entry for entry in self._entries.values() if entry.graph is not None]
        if len(captured) < MAX_CAPTURES:
            return True
        oldest = captured[0]
        if self._calls - oldest.last <= IDLE_CALLS:
            return False
        oldest.release()
        return True

    def _run(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The function as it is; once more without graphs where their memory is missing."""
        try:
            return function(*args)
        except RuntimeError as error:
            if not out_of_memory(error) or all(entry.graph is None for entry in self._entries.values()):
                raise
        self.release()
        self._failed = True
        return function(*args)

    def _captured(
        self,
        entry: _Entry,
        function: Callable[..., Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        tensors: list[Tensor],
    ) -> Any:
        """The function's results, by itself; meanwhile it is captured, unless there is a reason against it."""
        inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
        own = iter(inputs)
        args = pytree.tree_unflatten([next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        before, device = RandomState(inputs[0].device), inputs[0].device
        versions = [tensor._version for tensor in inputs]
        self.executor.settled = True
        with self._nothing_shared():
            results, spec = pytree.tree_flatten(self._run(function, args))
        results = _copies(results)
        if not self.executor.settled:
            entry.attempts += 1
            if entry.attempts == ATTEMPTS:
                entry.give_up("it is not a replay of recorded graphs alone")
        elif not before.is_current():
            entry.give_up("it draws random numbers")
        else:
            try:
                with no_random_numbers(), without_autocast_cache():
                    with self._nothing_shared(), Watch(device) as watch:
                        function(*args)
                    if watch.why or watch.operators > MAX_OPERATORS:
                        entry.give_up(f"it {watch.why or f'has {watch.operators} operators'}")
                    elif versions != [tensor._version for tensor in inputs]:
                        entry.give_up("it writes to its arguments")
                    else:
                        capturer = self._capturer(device)
                        with self._nothing_shared():
                            captured = capturer.capture(lambda: pytree.tree_leaves(function(*args)))
                        entry.graph = _Graph(captured, inputs, spec)
            except Exception as error:  # whatever a driver says
                self._fail(entry, error)
        return pytree.tree_unflatten(results, spec)

    def _compared(self, entry: _Entry, function: Callable[..., Any], args: Sequence[Any], tensors: list[Tensor]) -> Any:
        """The function's results, by itself; the graph's are compared with them."""
        assert entry.graph is not None
        why, results = "", None
        try:
            results = entry.graph(tensors)
        except Exception as error:  # whatever a driver says
            self._fail(entry, error)
        expected = self._run(function, args)
        if results is not None and entry.graph is not None:
            replayed, own = ([leaf[None] for leaf in pytree.tree_leaves(part)] for part in (results, expected))
            if not all(bool(leaf.isfinite().all()) for leaf in own if has_values(leaf)):
                return expected  # says nothing; the next call is compared
            why = disagreement(replayed, own, _SAME)
            entry.agrees = not why
        if why:
            entry.give_up(f"its replay is not what it gives itself: {why}")
        return expected

    def _fail(self, entry: _Entry, error: Exception) -> None:
        """Capture nothing from now on."""
        self._failed = True
        entry.give_up(str(error))
        self.release()

    def _capturer(self, device: torch.device) -> Capturer:
        if device not in self._capturers:
            self._capturers[device] = CAPTURERS[device.type](device)
        return self._capturers[device]

    @contextmanager
    def _nothing_shared(self) -> Iterator[None]:
        """The executor knows inputs by identity: here the same tensors have other values at each call."""
        self.executor.release()
        try:
            yield
        finally:
            self.executor.release()


def _by_dtype(tensors: list[Tensor]) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(i)
    return list(groups.values())


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, in one launch for each type."""
    for group in _by_dtype(targets):
        torch._foreach_copy_([targets[i] for i in group], [sources[i] for i in group])


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    _copy(copies, tensors)
    return copies
