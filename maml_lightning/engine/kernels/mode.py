"""Which operators the kernels replace: in an ordinary network as it runs, and in a graph that is compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from maml_lightning.engine.kernels.activations import hardsigmoid, rrelu
from maml_lightning.engine.kernels.autocast import autocast_operators, layer_norm
from maml_lightning.engine.kernels.convolution_layers import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from maml_lightning.engine.kernels.embedding import embedding_bag
from maml_lightning.engine.kernels.group_normalization import (
    group_norm,
    group_project,
    group_second_derivative,
    group_standardize,
)
from maml_lightning.engine.kernels.normalization import (
    batch_norm,
    instance_norm,
    project,
    second_derivative,
    standardize,
)
from maml_lightning.engine.kernels.patches import col2im_sum, im2col_views
from maml_lightning.engine.kernels.pooling import max_pool, max_pool_backward, poolings
from maml_lightning.engine.kernels.recurrence import recurrences, without_flattening
from maml_lightning.engine.kernels.weight_normalization import weight_norm


def _contiguous(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel with results laid out as torch's own; a traced graph drops the copy (``graphs.py``).

    Always a copy: autograd differentiates what a network writes into a view (``ReLU(inplace=True)``) by strides, for
    which a graph keeps all copies.
    """
    return lambda *args, **kwargs: kernel(*args, **kwargs).clone(memory_format=torch.contiguous_format)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{f: _contiguous(conv1d) for f in (torch.conv1d, F.conv1d)},
    **{f: _contiguous(conv2d) for f in (torch.conv2d, F.conv2d)},
    **{f: _contiguous(conv_transpose1d) for f in (torch.conv_transpose1d, F.conv_transpose1d)},
    **{f: _contiguous(conv_transpose2d) for f in (torch.conv_transpose2d, F.conv_transpose2d)},
    F.batch_norm: _contiguous(batch_norm),
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rrelu: rrelu,
    torch.rrelu: rrelu,
    torch.rrelu_: partial(rrelu, inplace=True),
    F.hardsigmoid: hardsigmoid,
    F.embedding_bag: embedding_bag,
    torch._weight_norm: weight_norm,
    **poolings(),
    **recurrences(),
    **autocast_operators(),
}

# What replaces an operator when a compiler follows: what it fuses better than it calls, and the reverse.
COMPILED: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.max_pool2d_with_indices.default: max_pool,
    torch.ops.aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    torch.ops.maml_lightning.standardize.default: standardize,
    torch.ops.maml_lightning.project.default: project,
    torch.ops.maml_lightning.second_derivative.default: second_derivative,
    torch.ops.maml_lightning.group_standardize.default: group_standardize,
    torch.ops.maml_lightning.group_project.default: group_project,
    torch.ops.maml_lightning.group_second_derivative.default: group_second_derivative,
    torch.ops.maml_lightning.im2col.default: im2col_views,
    torch.ops.maml_lightning.col2im.default: col2im_sum,
}


class TaskKernels(TorchFunctionMode):
    """While active, calls of an operator in :data:`REPLACEMENTS` (also from ``nn`` layers) run what replaces it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def task_operators() -> Iterator[None]:
    """What a network is called inside: the kernels, and attention as products, the only one with a second derivative.

    Transformer layers do not take their inference path inside, which vmap does not know: it gives way to any mode.
    Code that asks ``torch.compiler.is_compiling()`` learns that it must not read values, as for ``torch.compile``:
    networks of ``transformers`` then apply a mask where they would have looked whether it hides anything.
    """
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        with TaskKernels(), sdpa_kernel(SDPBackend.MATH), without_flattening():
            yield
    finally:
        torch.compiler._is_compiling_flag = compiling
