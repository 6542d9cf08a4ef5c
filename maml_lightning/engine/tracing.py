"""Functions of tensors as flat ATen graphs: traced once for a signature, then replayed as they are or compiled.

For small networks the interpreters of ``vmap``, ``vjp`` and autograd cost more than the arithmetic; a replayed graph
has none of them. A function and its pullback are traced together and cut in two, so that the backward half finds what
the forward half computed.
"""

import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.utils import _pytree as pytree

from maml_lightning.devices import autocast_dtype, without_autocast
from maml_lightning.engine.graphs import cut, evaluated, is_mutable, simplify, take_as_inputs
from maml_lightning.engine.hoisting import Hoisted
from maml_lightning.engine.jobs import COTANGENT
from maml_lightning.engine.kernels.mode import COMPILED
from maml_lightning.engine.recording import record


@contextmanager
def quiet() -> Iterator[None]:
    """For recording: fake tensors have nothing to detect, and what they log is the reason for another way.

    They make many objects that stay, among which a search for garbage takes a sixth of the time.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.autograd.set_detect_anomaly(False):
            yield
    finally:
        logger.disabled = disabled
        if collects:
            gc.enable()


def signature(leaves: Collection[Tensor]) -> tuple:
    """What a graph of the tensors is valid for: shapes, strides, types, devices and autocast."""
    devices = dict.fromkeys(["cpu", *(t.device.type for t in leaves)])
    return (*((t.shape, t.stride(), t.dtype, t.device) for t in leaves), *map(autocast_dtype, devices))


def _restride(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return tensor.new_empty_strided(like.shape, like.stride()).copy_(tensor)


def trace(function: Callable[..., list], leaves: list[Tensor], compiled: bool) -> tuple[fx.Graph, nn.Module]:
    """The graph of a function of tensors, simplified, and a module of its constants.

    Args:
        function: returns a list of tensors.
        leaves: example arguments.
        compiled: whether the graph is handed to a compiler.
    """
    common: tuple[dict, dict] = (COMPILED if compiled else {}, {})
    graph, constants = record(function, leaves, *common)
    graph.eliminate_dead_code()
    if any(is_mutable(node) for node in graph.nodes):  # such as the second derivative of mse_loss
        # Of the operators alone: vmap and vjp, which take the most time, have run.
        pure = functionalize(lambda *leaves: evaluated(graph, constants, leaves), remove="mutations")
        graph, constants = record(pure, leaves, *common)
    take_as_inputs(COTANGENT, graph)
    graph.eliminate_dead_code()
    simplify(graph)
    return graph, constants


def _ready(graph: fx.GraphModule, compiled: bool) -> Callable[..., Any]:
    return torch.compile(graph, dynamic=False) if compiled else graph


def _forward(graph: fx.GraphModule, compiled: bool) -> Callable[..., Any]:
    return _ready(graph, compiled) if compiled else Hoisted(graph)


@contextmanager
def _in_recorded_types(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A graph has the casts of autocast in it; the operators between them run in the types that they had."""
    kinds = dict.fromkeys(["cpu", *(tensor.device.type for tensor in tensors)])
    with ExitStack() as stack:
        for kind in kinds:
            if autocast_dtype(kind) is not None:
                stack.enter_context(without_autocast(kind))
        yield


class TracedCall(NamedTuple):
    """A function as a graph.

    Args:
        forward: of the arguments' tensors.
        out_spec: of the outputs.
    """

    forward: Callable[..., Any]
    out_spec: pytree.TreeSpec

    def __call__(self, leaves: list[Tensor]) -> Any:
        """The outputs."""
        with _in_recorded_types(leaves):
            return pytree.tree_unflatten(self.forward(*leaves), self.out_spec)


def traced_call(function: Callable, args: tuple, compiled: bool) -> TracedCall:
    """A replay of ``function(*args)``, for arguments of the same signature.

    Args:
        function: of pytrees of tensors, vectorized over tasks.
        args: example arguments.
        compiled: run the graph through ``torch.compile``.
    """
    leaves, spec = pytree.tree_flatten(args)
    out_spec: Any = None

    def flat(*leaves: Tensor) -> list:
        nonlocal out_spec
        out, out_spec = pytree.tree_flatten(function(*pytree.tree_unflatten(leaves, spec)))
        return out

    graph, constants = trace(flat, leaves, compiled)
    return TracedCall(_forward(fx.GraphModule(constants, graph), compiled), out_spec)


class TracedPair(NamedTuple):
    """A function and its pullback as two graphs.

    Args:
        forward: of the arguments' tensors: outputs and residuals.
        backward: of the residuals and the cotangents.
        cotangents: without values, with the strides that the backward half was traced with.
        out_spec: of the outputs.
        primal_spec: of the gradients.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    cotangents: list[Tensor]
    out_spec: pytree.TreeSpec
    primal_spec: pytree.TreeSpec

    def outputs(self, leaves: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """The outputs, and the residuals that the pullback takes."""
        with _in_recorded_types(leaves):
            outputs, residuals = self.forward(*leaves)
        return pytree.tree_unflatten(outputs, self.out_spec), residuals

    def pullback(self, residuals: list[Tensor], cotangents: Any) -> Any:
        """The gradients to the primal."""
        like = zip(pytree.tree_leaves(cotangents), self.cotangents, strict=True)
        with _in_recorded_types(residuals):
            gradients = self.backward(*residuals, *(_restride(cotangent, traced) for cotangent, traced in like))
        return pytree.tree_unflatten(gradients, self.primal_spec)


def traced_pair(joint: Callable, args: tuple, compiled: bool) -> TracedPair:
    """The replay of a function and its pullback.

    Args:
        joint: ``joint(primal, *args) -> (outputs, gradients)``, vectorized over tasks, of cotangents that it makes.
        args: example arguments, the primal first.
        compiled: run the graphs through ``torch.compile``.
    """
    leaves, spec = pytree.tree_flatten(args)
    out_spec: Any = None

    def flat(*leaves: Tensor) -> list:
        nonlocal out_spec
        outputs, gradients = joint(*pytree.tree_unflatten(leaves, spec))
        outputs, out_spec = pytree.tree_flatten(outputs)
        return [*outputs, *pytree.tree_leaves(gradients)]

    graph, constants = trace(flat, leaves, compiled)
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"][len(leaves) :]
    halves = cut(graph, constants, len(inputs))
    forward, backward = _forward(halves[0], compiled), _ready(halves[1], compiled)
    # Their strides alone: the graph is kept, and no memory with it.
    cotangents = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in inputs]
    return TracedPair(forward, backward, cotangents, out_spec, pytree.tree_structure(args[0]))
