"""Functions of tensors as flat ATen graphs: traced once for a signature, then replayed as they are or compiled.

For small networks the interpreters of ``vmap``, ``vjp`` and autograd cost more than the arithmetic; a replayed graph
has none of them. A function and its pullback are traced together and cut in two, so that the backward half finds what
the forward half computed.
"""

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.func import functionalize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from maml_lightning.engine.fingerprints import fingerprint, has_hooks
from maml_lightning.engine.graphs import cut, is_mutable, simplify, structure
from maml_lightning.engine.kernels.mode import COMPILED

log = logging.getLogger(__name__)
MAX_STATES = 8  # so many states of a network are traced; one that changes at each step runs untraced


def _signature(leaves: Iterable[Tensor]) -> tuple:
    autocast = {
        device: torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")
    }
    return (*((t.shape, t.stride(), t.dtype, t.device) for t in leaves), *autocast.items())


def _restride(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def trace(function: Callable[..., list], leaves: list[Tensor], compiled: bool) -> fx.GraphModule:
    """The graph of a function of tensors, simplified.

    Args:
        function: returns a list of tensors.
        leaves: example arguments.
        compiled: whether the graph is handed to a compiler.
    """

    # detach() makes every input an object of its own: make_fx would take two uses of one tensor for one input.
    def traced(function: Callable[..., list]) -> fx.GraphModule:
        with torch.no_grad():
            graph = make_fx(function, COMPILED if compiled else None, tracing_mode="fake")(
                *(leaf.detach() for leaf in leaves)
            )
        graph.graph.eliminate_dead_code()
        return graph

    graph = traced(function)
    if any(is_mutable(node) for node in graph.graph.nodes):  # such as the second derivative of mse_loss
        graph = traced(functionalize(function, remove="mutations"))
    simplify(graph)
    return graph


class _RandomState:
    """The current random state, so that a recomputed function draws the same numbers (dropout)."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class State:
    """The Python objects that functions depend on beside their tensors, as they are when this is made.

    Args:
        objects: the first argument of those functions, a tuple.
        key: their fingerprint.
        number: equal for equal states of one :class:`Tracer`; None where nothing is to be traced.
    """

    def __init__(self, objects: Any, key: Hashable, number: int | None) -> None:
        self.objects, self.key, self.number = objects, key, number

    def bind(self, function: Callable) -> "Bound":
        """``function`` with these objects as its first argument."""
        return Bound(function, self)


class Bound:
    """A function of tensors that depends on a :class:`State`."""

    def __init__(self, function: Callable, state: State) -> None:
        self.function, self.state = function, state

    def __call__(self, *args: Any) -> Any:
        return self.function(self.state.objects, *args)


def _random_draws() -> Hashable:
    drawn: Any = np.random.get_state()
    return random.getstate(), drawn[1].tobytes(), drawn[2]


class _Pair(NamedTuple):
    """A function and its pullback as two graphs."""

    forward: Callable[..., Any]  # of the primals: outputs and residuals
    backward: Callable[..., Any]  # of the residuals and the cotangents
    cotangents: list[Tensor]  # empty, with the strides that the backward half was traced with
    out_spec: pytree.TreeSpec

    def pullback(self, residuals: list[Tensor], cotangents: Any) -> list[Tensor]:
        like = zip(pytree.tree_leaves(cotangents), self.cotangents, strict=True)
        return self.backward(*residuals, *(_restride(cotangent, traced) for cotangent, traced in like))


class Tracer:
    """Runs functions of pytrees of tensors, vectorized over tasks, by replaying their graphs.

    A network that can be vectorized but not traced runs untraced: slower, with the same result. So do networks with
    forward hooks, those that change their own attributes or draw from Python's random numbers as they run, and those
    whose attributes keep changing between calls. Nothing here records autograd graphs. Copies and pickles begin
    without graphs.

    Args:
        compile: hand the graphs to ``torch.compile`` (inductor).
    """

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile
        self.kept_bytes = 0  # by the pullbacks made since this was last set to 0
        self._programs: dict[tuple, Any] = {}
        self._states: dict[Hashable, int] = {}
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_programs": {}, "_states": {}, "_warned": set()}

    def state(self, objects: tuple) -> State:
        """The state that ``objects`` are in now: their graphs are replayed while they are in it."""
        key = fingerprint(objects)
        if key not in self._states:
            if len(self._states) == MAX_STATES:
                self._warn(f"its attributes have changed {MAX_STATES} times")
                return State(objects, key, None)
            self._states[key] = len(self._states)
        return State(objects, key, self._states[key])

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            log.warning("The network cannot be traced and runs untraced, which is slower: %s", why)
            self._warned.add(why)

    def _program(self, function: Callable, key: tuple, build: Callable[[], Any]) -> Any:
        """What ``build`` makes of the function, once for each state and signature; None where it cannot be traced."""
        state = function.state if isinstance(function, Bound) else State((), fingerprint(()), 0)
        if state.number is None:
            return None
        key = (function.function if isinstance(function, Bound) else function, state.number, *key)
        if key not in self._programs:
            before = _random_draws()
            try:
                if has_hooks(state.objects):
                    raise ValueError("its forward hooks have to run at each call")
                with torch.autograd.set_detect_anomaly(False):  # fake tensors have nothing to detect
                    program = build()
                if _random_draws() != before:
                    raise ValueError("it draws from Python's or NumPy's random numbers")
                if fingerprint(state.objects) != state.key:
                    raise ValueError("it changes its own attributes as it runs")
                self._programs[key] = program
            except Exception as error:  # whatever a user's network raises under tracing
                self._warn(str(error).split("\n")[0])
                self._programs[key] = None
        return self._programs[key]

    def _ready(self, graph: fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(graph, dynamic=False) if self.compile else graph

    @torch.no_grad()
    def __call__(self, function: Callable, in_dims: tuple, *args: Any) -> Any:
        """``vmap(function, in_dims)(*args)``."""
        leaves, spec = pytree.tree_flatten(args)
        vectorized = vmap(function, in_dims=in_dims, randomness="different")

        def build() -> tuple:
            out_spec = None

            def flat(*leaves: Tensor) -> list:
                nonlocal out_spec
                out, out_spec = pytree.tree_flatten(vectorized(*pytree.tree_unflatten(leaves, spec)))
                return out

            graph = trace(flat, leaves, self.compile)
            return self._ready(graph), out_spec

        program = self._program(function, (in_dims, structure(spec), *_signature(leaves)), build)
        if program is None:
            return vectorized(*args)
        graph, out_spec = program
        return pytree.tree_unflatten(graph(*leaves), out_spec)

    @torch.no_grad()
    def vjp(
        self, function: Callable, in_dims: tuple, primal: Any, *args: Any, recompute: bool = False
    ) -> tuple[Any, Callable]:
        """``vmap`` of ``function(primal, *args)``, with its pullback to ``primal``, task by task.

        Args:
            function: of one task; returns a pytree of tensors.
            in_dims: of ``(primal, *args)``, 0 or None for each or for parts of it.
            recompute: keep only the arguments, and recompute the rest in the pullback.

        Returns:
            the outputs, and ``pullback(cotangents) -> gradients``, all with a leading task dimension.
        """

        def joint(cotangents: Any, primal: Any, *args: Any) -> tuple:
            outputs, pullback, *_ = vjp(lambda primal: function(primal, *args), primal)
            return outputs, pullback(cotangents)[0]

        vectorized = vmap(joint, in_dims=(0, *in_dims), randomness="different")
        leaves, spec = pytree.tree_flatten((primal, *args))
        primal_spec = pytree.tree_structure(primal)
        key = ("vjp", in_dims, structure(spec), *_signature(leaves))
        pair: _Pair | None = self._program(
            function, key, lambda: self._pair(vmap(function, in_dims, randomness="different"), vectorized, leaves, spec)
        )
        if pair is None or recompute:
            random_state = _RandomState(leaves[0].device)

            @torch.no_grad()
            def recomputed(cotangents: Any) -> Any:
                with random_state.restored():
                    if pair is None:
                        return vectorized(cotangents, primal, *args)[1]
                    gradients = pair.pullback(pair.forward(*leaves)[1], cotangents)
                    return pytree.tree_unflatten(gradients, primal_spec)

            return self(function, in_dims, primal, *args), recomputed

        outputs, residuals = pair.forward(*leaves)
        storages = (tensor.untyped_storage() for tensor in residuals)
        self.kept_bytes += sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        return pytree.tree_unflatten(outputs, pair.out_spec), lambda cotangents: pytree.tree_unflatten(
            pair.pullback(residuals, cotangents), primal_spec
        )

    def _pair(self, function: Callable, joint: Callable, leaves: list[Tensor], spec: pytree.TreeSpec) -> _Pair:
        """``function`` and its pullback, of ``joint``, which returns the outputs and the gradients of both."""
        with torch._subclasses.FakeTensorMode() as mode:
            fake = pytree.tree_unflatten([mode.from_tensor(leaf) for leaf in leaves], spec)
            outputs, out_spec = pytree.tree_flatten(function(*fake))
            outputs = [output.clone() for output in outputs]  # vmap may expand; cotangents are dense
        cotangents = [torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=o.device) for o in outputs]
        count = len(cotangents)

        def flat(*leaves: Tensor) -> list:
            args = pytree.tree_unflatten(leaves[: len(leaves) - count], spec)
            return pytree.tree_leaves(joint(pytree.tree_unflatten(leaves[len(leaves) - count :], out_spec), *args))

        forward, backward = cut(trace(flat, [*leaves, *cotangents], self.compile), count, count)
        return _Pair(self._ready(forward), self._ready(backward), cotangents, out_spec)
