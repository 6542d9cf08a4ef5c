"""Functions of one task over all tasks of a chunk by a loop of torch.autograd: slow for small networks, runs any."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.engine.differentiation import by_autograd, gradients_of
from maml_lightning.engine.memory import memory_of


def each_task(in_dims: Any, args: tuple) -> list[Any]:
    """The arguments of each task.

    Args:
        in_dims: 0 or None for each argument or for parts of it, as for ``vmap``.
        args: a tuple of pytrees.
    """
    leaves, spec = pytree.tree_flatten(args)
    dims: Any = pytree._broadcast_to_and_flatten(tuple(in_dims), spec)
    parts = [leaf if dim is None else leaf.unbind() for leaf, dim in zip(leaves, dims, strict=True)]
    tasks = next(len(leaf) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)
    return [
        pytree.tree_unflatten([p if dim is None else p[task] for p, dim in zip(parts, dims, strict=True)], spec)
        for task in range(tasks)
    ]


def call(function: Callable, in_dims: Any, args: tuple) -> Any:
    """``function`` of each task, stacked."""
    with torch.no_grad(), by_autograd():
        return _stacked([function(*own) for own in each_task(in_dims, args)])


def vjp(function: Callable, in_dims: Any, primal: Any, args: tuple) -> tuple[Any, Callable[[Any], Any]]:
    """``function(primal, *args)`` of each task, stacked, and its pullback to ``primal``.

    Args:
        function: of one task; returns a pytree of tensors.
        in_dims: of ``(primal, *args)``.
        primal: what it is differentiated with respect to.
        args: its other arguments.
    """
    results, records = [], []
    for own, *others in each_task(in_dims, (primal, *args)):
        inputs, spec = pytree.tree_flatten(own)
        inputs = [_differentiable(value) for value in inputs]
        with torch.enable_grad(), by_autograd():
            outputs = function(pytree.tree_unflatten(inputs, spec), *others)
        records.append((pytree.tree_leaves(outputs), inputs, spec))
        results.append(pytree.tree_map(torch.detach, outputs))

    def pullback(cotangents: Any) -> Any:
        leaves, gradients = pytree.tree_leaves(cotangents), []
        with by_autograd():  # checkpointed layers run anew
            for task, (outputs, inputs, spec) in enumerate(records):
                found = gradients_of(outputs, inputs, [leaf[task] for leaf in leaves], retain_graph=True)
                gradients.append(pytree.tree_unflatten(found, spec))
        return _stacked(gradients)

    return _stacked(results), pullback


def saved_bytes(function: Callable, in_dims: Any, args: tuple) -> int:
    """Bytes that autograd keeps for the backward pass through ``function`` of the first task, arguments left out.

    It differentiates with respect to the first argument and to what all tasks share, not to inputs and targets.
    """
    own = each_task(in_dims, args)[0]
    leaves, spec = pytree.tree_flatten(own)
    known = {memory_of(leaf) for leaf in leaves}
    dims: Any = pytree._broadcast_to_and_flatten((None, *in_dims[1:]), spec)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if memory_of(tensor) not in known:
            kept[memory_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [_differentiable(leaf) if dim is None else leaf for leaf, dim in zip(leaves, dims, strict=True)]
    with torch.enable_grad(), by_autograd(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*pytree.tree_unflatten(inputs, spec))
    del outputs
    return sum(kept.values())


def _differentiable(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point() or value.is_complex())


def _stacked(results: list[Any]) -> Any:
    return pytree.tree_map(lambda *parts: torch.stack(parts), results[0], *results[1:])
