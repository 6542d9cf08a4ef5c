"""Functions of tensors as flat ATen graphs: traced once for a signature, then replayed as they are or compiled.

For small networks the interpreters of ``vmap``, ``vjp`` and autograd cost more than the arithmetic; a replayed graph
has none of them. A function and its pullback are traced together and cut in two, so that the backward half finds what
the forward half computed.
"""

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.func import functionalize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from maml_lightning.engine.fingerprints import fingerprint, has_hooks
from maml_lightning.engine.kernels import COMPILED

log = logging.getLogger(__name__)
_STATES = 8  # so many states of a network are traced; one that changes at each step runs untraced


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


# A key for the structure of arguments; torch 2.7 has no hash of one with a dictionary in it.
_structure: Callable[[pytree.TreeSpec], Hashable] = (
    (lambda spec: spec) if _hashable(pytree.tree_structure({"": 0})) else str
)


def _signature(leaves: Iterable[Tensor]) -> tuple:
    autocast = {
        device: torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")
    }
    return (*((t.shape, t.stride(), t.dtype, t.device) for t in leaves), *autocast.items())


def _restride(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _trace(function: Callable[..., list], leaves: list[Tensor], compiled: bool) -> fx.GraphModule:
    # detach() makes every input an object of its own: make_fx would take two uses of one tensor for one input.
    def traced(function: Callable[..., list]) -> fx.GraphModule:
        with torch.no_grad():
            graph = make_fx(function, COMPILED if compiled else None, tracing_mode="fake")(
                *(leaf.detach() for leaf in leaves)
            )
        graph.graph.eliminate_dead_code()
        return graph

    graph = traced(function)
    if any(_is_mutable(node) for node in graph.graph.nodes):  # such as the second derivative of mse_loss
        graph = traced(functionalize(function, remove="mutations"))
    if not any(_is_mutable(node) for node in graph.graph.nodes):
        _share(graph.graph)
        _gather_sums(graph.graph)
    graph.recompile()
    return graph


def _share(graph: fx.Graph) -> None:
    """Compute equal subexpressions once: each derivative of a convolution gathers its patches anew."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        arguments, spec = pytree.tree_flatten((node.args, node.kwargs))
        first = seen.setdefault((node.target, _structure(spec), *((type(a), a) for a in arguments)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


_aten = torch.ops.aten
_LINEAR = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.transpose.int,
    torch.ops.maml_lightning.col2im.default,
}


def _gather_sums(graph: fx.Graph) -> None:
    """``f(a) + f(b) -> f(a + b)`` for linear ``f``, ``a @ b + c @ d`` in one pass over memory, ``0 + a -> a``.

    The two terms of a convolution's second derivative become one matrix product and one scatter; the zeros are what
    torch takes for the second derivative of an activation.
    """
    sums = [node for node in graph.nodes if node.target is _aten.add.Tensor and len(node.args) == 2]
    sums = [node for node in sums if not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)]
    for node in sums:
        for zero, other in (node.args, node.args[::-1]):
            if zero.target is _aten.zeros_like.default and _same(other, node):
                node.replace_all_uses_with(other)
                break
    graph.eliminate_dead_code()
    sums = [node for node in sums if node.users]
    while sums:
        node = sums.pop()
        a, b = node.args
        if a is b or a.target is not b.target or len(a.users) > 1 or len(b.users) > 1:
            continue
        with graph.inserting_before(node):
            if a.target is _aten.bmm.default:
                merged = graph.call_function(_aten.baddbmm.default, (a, *b.args))
            elif a.target in _LINEAR and a.args[1:] == b.args[1:] and _same(a.args[0], b.args[0]):
                inner = graph.call_function(_aten.add.Tensor, (a.args[0], b.args[0]))
                inner.meta = dict(a.args[0].meta)
                merged = graph.call_function(a.target, (inner, *a.args[1:]))
                sums.append(inner)
            else:
                continue
        merged.meta = dict(node.meta)
        node.replace_all_uses_with(merged)
        for dead in (node, b, a):
            if not dead.users:
                graph.erase_node(dead)


def _same(a: fx.Node, b: fx.Node) -> bool:
    return all(getattr(a.meta["val"], what) == getattr(b.meta["val"], what) for what in ("shape", "dtype"))


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _is_mutable(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _copy(
    nodes: Iterable[fx.Node], placeholders: Iterable[fx.Node], outputs: Any, owner: fx.GraphModule
) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in placeholders:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = node.meta
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(pytree.tree_map(lambda node: copies.get(node, node), outputs))
    graph.eliminate_dead_code()
    return fx.GraphModule(owner, graph)


def cut(joint: fx.GraphModule, cotangents: int, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph into what does not depend on the cotangents and what does.

    Args:
        joint: its last ``cotangents`` inputs are cotangents; its first ``outputs`` outputs belong to the forward half.

    Returns:
        ``forward(*primals) -> (outputs, residuals)`` and ``backward(*residuals, *cotangents) -> gradients``.

    Raises:
        ValueError: the backward half writes in place, so that the order of the two halves would matter.
    """
    nodes = [node for node in joint.graph.nodes if node.op != "output"]
    given = [node for node in nodes if node.op == "placeholder"]
    late = dict.fromkeys(given[len(given) - cotangents :])
    for node in nodes:
        if any(source in late for source in node.all_input_nodes):
            late[node] = None
    if any(_is_mutable(node) for node in late):
        raise ValueError("the backward half works in place")
    results: Any = _output(joint.graph).args[0]
    ahead, behind = results[:outputs], results[outputs:]
    residuals = [n for n in nodes if n not in late and (n in behind or any(user in late for user in n.users))]
    early = [node for node in nodes if node not in late and node.op != "placeholder"]
    forward = _copy(early, given[: len(given) - cotangents], [list(ahead), residuals], joint)
    backward = _copy(
        [node for node in late if node.op != "placeholder"],
        [*residuals, *given[len(given) - cotangents :]],
        list(behind),
        joint,
    )
    return forward, backward


class _RandomState:
    """The random state of now, so that what is computed again draws the same (dropout)."""

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

    def __init__(self, objects: tuple, key: Hashable, number: int | None) -> None:
        self.objects, self.key, self.number = objects, key, number

    def bind(self, function: Callable) -> "Bound":
        """``function`` with its first argument given."""
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


class Tracer:
    """Runs functions of pytrees of tensors, vectorised over tasks, by replaying their graphs.

    A network that can be vectorised but not traced runs untraced: slower, with the same result. So do networks with
    forward hooks, those that change their own attributes or draw from Python's random numbers as they run, and those
    that are given another state again and again. Nothing here records autograd graphs. Copies and pickles begin
    without graphs.

    Args:
        compile: hand the graphs to ``torch.compile`` (inductor).
    """

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile
        self.kept_bytes = 0  # what the last vjp holds for its pullback
        self._programs: dict[tuple, Any] = {}
        self._states: dict[Hashable, int] = {}
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_programs": {}, "_states": {}, "_said": set()}

    def state(self, objects: tuple) -> State:
        """The state that ``objects`` are in now: their graphs are replayed while they are in it."""
        key = fingerprint(objects)
        if key not in self._states:
            if len(self._states) == _STATES:
                self._untraced(f"its attributes have changed {_STATES} times")
                return State(objects, key, None)
            self._states[key] = len(self._states)
        return State(objects, key, self._states[key])

    def _untraced(self, why: str) -> None:
        if why not in self._said:
            log.warning("The network cannot be traced and runs untraced, which is slower: %s", why)
            self._said.add(why)

    def _program(self, function: Callable, key: tuple, build: Callable[[], Any]) -> Any:
        state = function.state if isinstance(function, Bound) else State((), fingerprint(()), 0)
        if state.number is None:
            return None
        key = (function.function if isinstance(function, Bound) else function, state.number, *key)
        if key not in self._programs:
            before = _random_draws()
            try:
                if has_hooks(state.objects):
                    raise ValueError("its forward hooks have to run at each call")
                program = build()
                if _random_draws() != before:
                    raise ValueError("it draws from Python's or NumPy's random numbers")
                if fingerprint(state.objects) != state.key:
                    raise ValueError("it changes its own attributes as it runs")
                self._programs[key] = program
            except Exception as error:  # whatever a user's network raises under tracing
                self._untraced(str(error).split("\n")[0])
                self._programs[key] = None
        return self._programs[key]

    def _ready(self, graph: fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(graph, dynamic=False) if self.compile else graph

    @torch.no_grad()
    def __call__(self, function: Callable, in_dims: tuple, *args: Any) -> Any:
        """``vmap(function, in_dims)(*args)``."""
        leaves, spec = pytree.tree_flatten(args)
        vectorised = vmap(function, in_dims=in_dims, randomness="different")

        def build() -> tuple:
            out_spec = None

            def flat(*leaves: Tensor) -> list:
                nonlocal out_spec
                out, out_spec = pytree.tree_flatten(vectorised(*pytree.tree_unflatten(leaves, spec)))
                return out

            graph = _trace(flat, leaves, self.compile)
            return self._ready(graph), out_spec

        program = self._program(function, (in_dims, _structure(spec), *_signature(leaves)), build)
        if program is None:
            return vectorised(*args)
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
            recompute: keep nothing but the arguments and compute the rest again in the pullback.

        Returns:
            the outputs, and ``pullback(cotangents) -> gradients``, all with a leading task dimension.
        """

        def joint(cotangents: Any, primal: Any, *args: Any) -> tuple:
            outputs, pullback, *_ = vjp(lambda primal: function(primal, *args), primal)
            return outputs, pullback(cotangents)[0]

        vectorised = vmap(joint, in_dims=(0, *in_dims), randomness="different")
        leaves, spec = pytree.tree_flatten((primal, *args))
        primal_spec = pytree.tree_structure(primal)

        def build() -> Any:
            only = vmap(function, in_dims=in_dims, randomness="different")
            with torch._subclasses.FakeTensorMode() as mode:
                fake = pytree.tree_map(mode.from_tensor, (primal, *args))
                outputs, out_spec = pytree.tree_flatten(only(*fake))
                outputs = [output.clone() for output in outputs]  # vmap may expand; cotangents are dense
            shaped = [torch.empty_strided(o.shape, o.stride(), dtype=o.dtype, device=o.device) for o in outputs]
            count = len(shaped)

            def flat(*leaves: Tensor) -> list:
                cotangents = pytree.tree_unflatten(leaves[len(leaves) - count :], out_spec)
                return pytree.tree_leaves(
                    vectorised(cotangents, *pytree.tree_unflatten(leaves[: len(leaves) - count], spec))
                )

            forward, backward = cut(_trace(flat, [*leaves, *shaped], self.compile), count, count)
            return self._ready(forward), self._ready(backward), shaped, out_spec

        program: Any = self._program(function, ("vjp", in_dims, _structure(spec), *_signature(leaves)), build)

        def backward(residuals: list[Tensor], cotangents: Any) -> Any:
            _, half, shaped, _ = program
            given = [_restride(c, like) for c, like in zip(pytree.tree_leaves(cotangents), shaped, strict=True)]
            return pytree.tree_unflatten(half(*residuals, *given), primal_spec)

        if program is None or recompute:
            random = _RandomState(leaves[0].device)

            @torch.no_grad()
            def recomputed(cotangents: Any) -> Any:
                with random.restored():
                    if program is None:
                        return vectorised(cotangents, primal, *args)[1]
                    return backward(program[0](*leaves)[1], cotangents)

            return self(function, in_dims, primal, *args), recomputed

        outputs, residuals = program[0](*leaves)
        self.kept_bytes = sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in residuals}.values()
        )
        return pytree.tree_unflatten(outputs, program[3]), lambda cotangents: backward(residuals, cotangents)
