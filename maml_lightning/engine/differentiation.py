"""Gradients inside a function of one task, by torch.func or by autograd, as the function is run.

Vectorized over tasks, a function needs :func:`torch.func.grad`. In a loop over tasks :func:`torch.autograd.grad` runs
whatever a training loop can run, branches on values included.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from maml_lightning.engine.kernels.alone import twice_differentiable
from maml_lightning.engine.kernels.recurrence import without_flattening

_AUTOGRAD = ContextVar("autograd", default=False)


@contextmanager
def by_autograd() -> Iterator[None]:
    """While active, gradients are taken by autograd, of operators with a second derivative: attention is products."""
    token = _AUTOGRAD.set(True)
    try:
        with twice_differentiable(), without_flattening(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _AUTOGRAD.reset(token)


def is_by_autograd() -> bool:
    """Whether gradients are taken by autograd now."""
    return _AUTOGRAD.get()


def grad(function: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    """The gradient of a scalar function of a pytree of tensors, like ``torch.func.grad``.

    Args:
        function: returns a scalar.
    """
    if not _AUTOGRAD.get():
        return torch.func.grad(function)
    return lambda params: grad_and_value(lambda params: (function(params), None))(params)[0]


def grad_and_value(function: Callable[[Any], tuple[Tensor, Any]]) -> Callable[[Any], tuple[Any, tuple[Tensor, Any]]]:
    """``(gradient, (value, auxiliary output))``, like ``torch.func.grad_and_value`` with ``has_aux``.

    By autograd, the gradient has a graph of its own only where autograd records.

    Args:
        function: returns a scalar and anything else.
    """
    if not _AUTOGRAD.get():
        return torch.func.grad_and_value(function, has_aux=True)

    def run(params: Any) -> tuple[Any, tuple[Tensor, Any]]:
        leaves, unflatten = _flattened(params)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            own = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
            value, auxiliary = function(unflatten(own))
            gradients = gradients_of([value], own, None, create_graph)
        if not create_graph:
            value, auxiliary = value.detach(), pytree.tree_map_only(Tensor, torch.detach, auxiliary)
        return unflatten(gradients), (value, auxiliary)

    return run


def _flattened(params: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a pytree, and what puts others in their places."""
    if type(params) is dict and all(isinstance(value, Tensor) for value in params.values()):  # as most are: fast
        return list(params.values()), lambda values: dict(zip(params, values, strict=True))
    leaves, spec = pytree.tree_flatten(params)
    return leaves, lambda values: pytree.tree_unflatten(values, spec)


def gradients_of(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: list[Tensor] | None = None,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor]:
    """``torch.autograd.grad``, zero where an output does not depend on an input.

    Args:
        outputs: differentiated tensors.
        inputs: what the gradient is of; those that record no gradient get zeros.
        cotangents: of each output; None for a scalar.
        create_graph: whether the gradients can be differentiated.
        retain_graph: whether it is called again.
    """
    recorded = [output.requires_grad for output in outputs]
    wanted = [value for value in inputs if value.requires_grad]
    if not wanted or not any(recorded):
        return [torch.zeros_like(value) for value in inputs]
    gradients = torch.autograd.grad(
        list(compress(outputs, recorded)),
        wanted,
        None if cotangents is None else list(compress(cotangents, recorded)),
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    # `nn.Embedding(sparse=True)` has a sparse gradient, which few operators of an inner optimizer take.
    dense = [value if value.layout is torch.strided else value.to_dense() for value in gradients]
    if len(wanted) == len(inputs):
        return dense
    found = iter(dense)
    return [next(found) if value.requires_grad else torch.zeros_like(value) for value in inputs]
