"""Passes over traced ATen graphs: fewer operators for the same values, and the cut into forward and backward half."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from maml_lightning.engine.kernels.patches import COL2IM


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


# A key for the structure of arguments; torch 2.7 has no hash of one with a dictionary in it.
structure: Callable[[pytree.TreeSpec], Hashable] = (
    (lambda spec: spec) if _hashable(pytree.tree_structure({"": 0})) else str
)


def called(graph: fx.Graph, target: Any, args: tuple, kwargs: dict, name: str | None = None) -> fx.Node:
    """``graph.call_function``, which from torch 2.14 on searches the arguments for symbolic sizes; here are none."""
    node = graph.create_node("call_function", target, name=name)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def simplify(graph: fx.Graph) -> None:
    """Drop copies, compute equal subexpressions once and merge sums, unless the graph writes in place."""
    if not any(is_mutable(node) for node in graph.nodes):
        _drop_copies(graph)
        _share(graph)
        _merge_sums(graph)
        _copy_where_a_view_fails(graph)
        _copy_for_group_norm(graph)


def _share(graph: fx.Graph) -> None:
    """Compute equal subexpressions once: each derivative of a convolution gathers its patches once more."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        first = seen.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(value: Any) -> Hashable:
    """The same for equal arguments of the same type: 1 is not 1.0."""
    if isinstance(value, tuple | list):
        return (*map(_key, value),)
    if isinstance(value, dict):
        return (*((name, _key(part)) for name, part in value.items()),)
    return value if isinstance(value, fx.Node) else (type(value), value)


_aten = torch.ops.aten
# What a tensor's strides change the values of.
_STRIDED = {_aten.as_strided.default, _aten.as_strided_scatter.default, _aten.view.dtype, _aten.view_as_complex.default}


def _drop_copies(graph: fx.Graph) -> None:
    """Copies that are for the network's own code, which has run: between kernels data stays channels-last."""
    names = {_aten.detach.default, _aten.alias.default}  # other names for the same values
    copies = set() if any(node.target in _STRIDED for node in graph.nodes) else {_aten.clone.default}
    for node in list(graph.nodes):
        inside = not any(user.op == "output" for user in node.users)
        if (node.target in copies and inside) or (
            node.target in names and (inside or node.args[0].op == "call_function")
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _copy_where_a_view_fails(graph: fx.Graph) -> None:
    """Strides differ from the traced ones where copies were dropped, and where fake tensors have others than real."""
    for node in graph.nodes:
        if node.target in (_aten.view.default, _aten._unsafe_view.default):
            node.target = _aten.reshape.default


# How many of their first arguments are images.
_GROUP_NORM = {_aten.native_group_norm.default: 1, _aten.native_group_norm_backward.default: 2}


def _copy_for_group_norm(graph: fx.Graph) -> None:
    """On GPUs group normalization takes images in torch's own layout alone; on CPUs it is faster in channels-last."""
    for node in graph.nodes:
        for image in node.args[: _GROUP_NORM.get(node.target, 0)]:
            if image.meta["val"].device.type == "cpu":
                continue
            with graph.inserting_before(node):
                copy = graph.call_function(_aten.contiguous.default, (image,))
            copy.meta = dict(image.meta)
            node.replace_input_with(image, copy)


_LINEAR = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.permute.default,
    _aten.transpose.int,
    COL2IM,
}


def _merge_sums(graph: fx.Graph) -> None:
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


def output_of(graph: fx.Graph) -> fx.Node:
    """The node that returns the results."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def is_mutable(node: fx.Node) -> bool:
    """Whether the node writes in place."""
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def depending_on(sources: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The sources, and what is computed from them, in the order of ``nodes``."""
    dependent = dict.fromkeys(sources)
    for node in nodes:
        if any(source in dependent for source in node.all_input_nodes):
            dependent[node] = None
    return dependent


def subgraph(
    nodes: Iterable[fx.Node], placeholders: Iterable[fx.Node], outputs: Any, owner: nn.Module
) -> fx.GraphModule:
    """A part of a graph, whose constants ``owner`` has: ``nodes``, of ``placeholders``, which may be any nodes."""
    graph, copies = fx.Graph(), {}
    for node in placeholders:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = node.meta
    for node in nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = called(graph, node.target, args, kwargs, node.name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(pytree.tree_map(lambda node: copies.get(node, node), outputs))
    graph.eliminate_dead_code()
    return fx.GraphModule(owner, graph)


def evaluated(graph: fx.Graph, constants: nn.Module, inputs: Iterable[Any]) -> Any:
    """The results of a graph that runs but once, for which no code is written."""
    values, given = {}, iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = getattr(constants, node.target)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = args[0] if node.op == "output" else node.target(*args, **kwargs)
    return values[node]


def take_as_inputs(target: Any, graph: fx.Graph) -> None:
    """Make the results of all calls of ``target`` further inputs of a graph, in the order of the calls."""
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is target:
            with graph.inserting_after(last):
                last = graph.placeholder(node.name)
            last.meta = node.meta
            node.replace_all_uses_with(last)
            graph.erase_node(node)


def cut(joint: fx.Graph, constants: nn.Module, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph into what does not depend on the cotangents and what does.

    Args:
        joint: its last ``count`` inputs are cotangents; its first ``count`` outputs belong to the forward half.
        constants: of the graph.

    Returns:
        ``forward(*primals) -> (outputs, residuals)`` and ``backward(*residuals, *cotangents) -> gradients``.

    Raises:
        ValueError: the backward half writes in place, so that the order of the two halves would matter.
    """
    nodes = [node for node in joint.nodes if node.op != "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    primals, cotangent_inputs = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
    dependent = depending_on(cotangent_inputs, nodes)
    if any(is_mutable(node) for node in dependent):
        raise ValueError("the backward half writes in place")
    results: Any = output_of(joint).args[0]
    values, gradients = list(results[:count]), list(results[count:])
    independent = [node for node in nodes if node not in dependent]
    kept = set(gradients)
    residuals = [n for n in independent if n in kept or any(user in dependent for user in n.users)]
    forward_nodes, backward_nodes = (
        [node for node in half if node.op != "placeholder"] for half in (independent, dependent)
    )
    forward = subgraph(forward_nodes, primals, [values, residuals], constants)
    backward = subgraph(backward_nodes, [*residuals, *cotangent_inputs], gradients, constants)
    return forward, backward
