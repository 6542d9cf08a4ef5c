"""Operators with the types that torch's own have under autocast, where they are vectorized over tasks.

Autocast casts the arguments of an operator. Vectorized over tasks a linear layer is two, a product and the addition of
its bias, and each is cast by itself: the sum with a bias in float32 would be float32, where torch's own is in the lower
precision, and code that asks for the type of a layer's outputs would go another way than in a loop. Normalization
layers on a CPU take inputs in lower precision beside weights in float32, and give them back in it; vectorized they gave
float32, or their gradient found two types and raised.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.devices import HALF, autocast_dtype, without_autocast


def in_types_of_arguments(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of the package's own that runs in the types of its arguments, whether it is recorded or not."""

    @wraps(operator)
    def run(first: Tensor, *others: Any) -> Any:
        with without_autocast(first.device.type):
            return operator(first, *others)

    return run


def _cast(operator: Callable[..., Any], to: torch.dtype | None = None) -> Callable[..., Any]:
    """An operator that autocast runs in lower precision, or in ``to``: its arguments are cast at once."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = next(autocast_dtype(arg.device.type) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        if dtype is None:
            return operator(*args, **kwargs)

        def lower(value: Tensor) -> Tensor:
            return value.to(to or dtype) if value.is_floating_point() and value.dtype != torch.float64 else value

        args, kwargs = pytree.tree_map_only(Tensor, lower, (args, kwargs))
        return operator(*args, **kwargs)

    return run


def autocast_operators() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of several parts, by torch's own; distances are in float32."""
    products = (torch.addmm, torch.baddbmm, torch.addbmm)
    methods = (Tensor.addmm, Tensor.baddbmm, Tensor.addbmm)
    distances = {torch.cdist: _cast(torch.cdist, torch.float32)}
    return distances | {
        own: _cast(own) for own in (F.linear, F.multi_head_attention_forward, F.prelu, *products, *methods)
    }


def _is_mixed(input: Tensor, weight: Tensor | None) -> bool:
    return input.device.type == "cpu" and input.dtype in HALF and weight is not None and weight.dtype != input.dtype


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``F.layer_norm``."""
    if not _is_mixed(input, weight):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return F.layer_norm(input.float(), normalized_shape, weight, bias, eps).to(input.dtype)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``F.group_norm``."""
    if not _is_mixed(input, weight):
        return F.group_norm(input, num_groups, weight, bias, eps)
    return F.group_norm(input.float(), num_groups, weight, bias, eps).to(input.dtype)
