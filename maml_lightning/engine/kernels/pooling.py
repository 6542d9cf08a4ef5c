"""Max-pooling as a call that compilers leave alone, and with a second derivative on every torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from maml_lightning.engine.kernels.layout import Ints

_aten = torch.ops.aten


# Inductor turns max-pooling into scalar loops, half as fast as torch's own kernels; behind these it stays a call.
@custom_op("maml_lightning::max_pool", mutates_args=())
def _max_pool_op(
    x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    return _aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)


@custom_op("maml_lightning::max_pool_backward", mutates_args=())
def max_pool_backward(
    g: Tensor,
    x: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """``max_pool2d_with_indices_backward`` as a call that stays one."""
    return _aten.max_pool2d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices)


_max_pool_op.register_fake(_aten.max_pool2d_with_indices)
max_pool_backward.register_fake(_aten.max_pool2d_with_indices_backward)


def max_pool(
    x: Tensor,
    kernel: Ints,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """``max_pool2d_with_indices`` as a call that stays one."""
    return _max_pool_op(x, kernel, list(stride), list(padding), list(dilation), ceil_mode)


def _of_contiguous(pool: Callable[..., Any]) -> Callable[..., Any]:
    return lambda input, *args, **kwargs: pool(input.contiguous(), *args, **kwargs)


def poolings() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What replaces torch's max-pooling: before 2.15 vmap has no second derivative of it for channels-last images.

    It fails there with "querying is_contiguous".
    """
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.15":
        return {}
    names = ("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d")
    pools = [p for n in names for p in (getattr(torch, n, None), getattr(F, n), getattr(F, f"{n}_with_indices")) if p]
    return {pool: _of_contiguous(pool) for pool in pools}
