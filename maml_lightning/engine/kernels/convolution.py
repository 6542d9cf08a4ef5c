"""Convolution as three bilinear maps, each of which is differentiated into the other two.

For ``y = x * w`` these are the convolution, its transpose in the input (which takes ``y``'s gradient to ``x``'s) and
its transpose in the weight. Under :func:`torch.func.vmap` all three become matrix products of gathered patches
(im2col, Chellapilla, Puri and Simard 2006), batched over tasks, or torch's own convolutions: on a CPU task by task
where patches leave a cache; on a GPU what is fastest (``measured.py``). Data stays channels-last between layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from maml_lightning.engine.kernels.grouped import gradients, grouped, grouped_input, grouped_weight
from maml_lightning.engine.kernels.layout import (
    HWIO,
    NCHW,
    NHWC,
    OIHW,
    Ints,
    leaves_cache,
    permute_each,
    spans,
    tasks_first,
)
from maml_lightning.engine.kernels.measured import MEASURED, Way, fastest
from maml_lightning.engine.kernels.patches import col2im, im2col


# Opaque operators, like those of ``patches.py``. All is channels-last: images [B, H, W, C] or, task by task,
# [T, B, H, W, C]; weights [T, kh, kw, C, O].
def _channels_first(x: Tensor) -> Tensor:
    return x.permute(NCHW)


def _filters(w: Tensor) -> Tensor:
    return w.permute(OIHW).contiguous(memory_format=torch.channels_last)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous()[None] if len(parts) == 1 else torch.stack(parts)


@custom_op("maml_lightning::convolution", mutates_args=())
def _direct(x: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    return _stacked(
        [
            F.conv2d(_channels_first(x), _filters(w), None, stride, padding, dilation, groups).permute(NHWC)
            for x, w in zip(x, w, strict=True)
        ]
    )


@grouped.register_fake
@_direct.register_fake
def _(x: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    return x.new_empty(*x.shape[:2], *spans(x.shape[2:4], w.shape[1:3], stride, padding, dilation), w.shape[4])


@custom_op("maml_lightning::convolution_input", mutates_args=())
def _direct_input(g: Tensor, w: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    window = (stride, padding, dilation, groups)
    x = _channels_first(g.new_empty(g.shape[1], *size, w.shape[3] * groups))  # only its shape counts
    return _stacked(
        [
            gradients([True, False, False], _channels_first(g), x, _filters(w), *window)[0].permute(NHWC)
            for g, w in zip(g, w, strict=True)
        ]
    )


@grouped_input.register_fake
@_direct_input.register_fake
def _(g: Tensor, w: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    return g.new_empty(*g.shape[:2], *size, w.shape[3] * groups)


@custom_op("maml_lightning::convolution_weight", mutates_args=())
def _direct_weight(
    x: Tensor, g: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    window = (stride, padding, dilation, groups)
    w = _filters(x.new_empty(*kernel, x.shape[4] // groups, g.shape[4]))  # only its shape counts
    return _stacked(
        [
            gradients([False, True, False], _channels_first(g), _channels_first(x), w, *window)[1].permute(HWIO)
            for x, g in zip(x, g, strict=True)
        ]
    )


@grouped_weight.register_fake
@_direct_weight.register_fake
def _(x: Tensor, g: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    return x.new_empty(x.shape[0], *kernel, x.shape[4] // groups, g.shape[4])


CONVOLUTIONS = {torch.ops.maml_lightning.convolution.default, torch.ops.maml_lightning.grouped_convolution.default}


def _patches(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """``[T, B, H, W, C] -> [T, B*H'*W', kh*kw*C]``."""
    return im2col(x.flatten(0, 1), kernel, stride, padding).unflatten(0, x.shape[:2]).flatten(1, 3)


# The same three maps as matrix products of patches, of the same arguments.
def _product(x: Tensor, w: Tensor, stride: Ints, padding: Ints) -> Tensor:
    kernel = list(w.shape[1:3])
    y = _patches(x, kernel, stride, padding).bmm(w.flatten(1, 3))
    return y.reshape(*x.shape[:2], *spans(x.shape[2:4], kernel, stride, padding), -1)


def _product_input(g: Tensor, w: Tensor, size: Ints, stride: Ints, padding: Ints) -> Tensor:
    columns = g.flatten(1, 3).bmm(w.flatten(1, 3).mT)
    columns = columns.reshape(-1, *g.shape[2:4], columns.shape[2])
    return col2im(columns, size, list(w.shape[1:3]), stride, padding).unflatten(0, g.shape[:2])


def _product_weight(x: Tensor, g: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    return _patches(x, kernel, stride, padding).mT.bmm(g.flatten(1, 3)).unflatten(1, (*kernel, -1))


class _Map(NamedTuple):
    """One of the three maps, channels-last, in three ways.

    Args:
        product: of patches, for convolutions that are neither grouped nor dilated; without those two settings.
        direct: torch's convolution, task by task.
        grouped: torch's convolution, a group for each task.
    """

    product: Callable[..., Tensor]
    direct: Callable[..., Tensor]
    grouped: Callable[..., Tensor]


_MAPS = {
    "convolution": _Map(_product, _direct, grouped),
    "input": _Map(_product_input, _direct_input, grouped_input),
    "weight": _Map(_product_weight, _direct_weight, grouped_weight),
}


def _over_tasks(
    info: Any,
    in_dims: tuple,
    operands: tuple[Tensor, Tensor],
    orders: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    window: tuple[Any, ...],
    patch_elements: Callable[[Tensor, Tensor], int],
    name: str,
) -> tuple[Tensor, int]:
    """The ``vmap`` rule of all three maps, in the way that is fastest.

    Args:
        info: and ``in_dims`` as :class:`torch.autograd.Function` gives them.
        operands: images and weight, or two images; ``window`` are the other arguments.
        orders: to channels-last of each operand, and back from it of the result.
        patch_elements: how many numbers one task's patches are.
        name: of the map.
    """
    a, b = (tasks_first(operands[i], in_dims[i], info.batch_size, orders[i]) for i in range(2))
    (*plain, dilation, groups), ways, elements = window, _MAPS[name], patch_elements(a, b)

    def together(a: Tensor, b: Tensor) -> Tensor:
        return ways.direct(a.flatten(0, 1)[None], b[:1], *window)[0].unflatten(0, a.shape[:2])

    runs: dict[str, Way] = {}
    if groups == 1 and dilation == [1, 1]:
        runs["patches"] = Way(lambda a, b: ways.product(a, b, *plain), len(a) * elements * a.element_size())
    if in_dims[1] is None and orders[1] == HWIO:  # one weight for all tasks: their images are one batch
        runs["one batch"] = Way(together, 0)
    else:
        runs["task by task"] = Way(lambda a, b: ways.direct(a, b, *window), 0)
        runs["grouped"] = Way(lambda a, b: ways.grouped(a, b, *window), a.nbytes + b.nbytes)
    if a.device.type in MEASURED:
        way = fastest((name, repr(window)), runs, a, b)
    else:
        way = next(way for way in runs if way != "patches" or not leaves_cache(a, elements))
    return permute_each(runs[way].run(a, b), orders[2]), 0


class _Convolution(Function):
    """``y = x * w``: images ``[B, C, H, W]``, weight ``[O, C / groups, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, *ctx.window = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        to_x = _InputGradient.apply(g, w, list(x.shape[2:]), *ctx.window) if ctx.needs_input_grad[0] else None
        to_w = _WeightGradient.apply(x, g, list(w.shape[2:]), *ctx.window) if ctx.needs_input_grad[1] else None
        return to_x, to_w, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, w: Tensor, *window: Any) -> tuple:
        def patch_elements(x: Tensor, w: Tensor) -> int:
            windows = math.prod(spans(x.shape[2:4], w.shape[1:3], *window[:2]))
            return x.shape[1] * windows * math.prod(w.shape[1:4])

        return _over_tasks(info, in_dims, (x, w), (NHWC, HWIO, NCHW), window, patch_elements, "convolution")


class _InputGradient(Function):
    """The transpose of :class:`_Convolution` in its input: ``[B, O, H', W'] -> [B, C, H, W]``."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, size: Ints, *window: Any) -> Tensor:
        g, w = g.permute(NHWC)[None], w.permute(HWIO)[None]
        return _direct_input(g, w, size, *window)[0].permute(NCHW)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, w, _, *ctx.window = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple:
        g, w = ctx.saved_tensors
        to_g = _Convolution.apply(u, w, *ctx.window)
        return to_g, _WeightGradient.apply(u, g, list(w.shape[2:]), *ctx.window), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, g: Tensor, w: Tensor, *window: Any) -> tuple:
        def patch_elements(g: Tensor, w: Tensor) -> int:
            return math.prod(g.shape[1:4]) * math.prod(w.shape[1:4])

        orders = (NHWC, HWIO, NCHW)
        return _over_tasks(info, in_dims, (g, w), orders, window, patch_elements, "input")


class _WeightGradient(Function):
    """The transpose of :class:`_Convolution` in its weight: ``[B, C, H, W], [B, O, H', W'] -> [O, C, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, kernel: Ints, *window: Any) -> Tensor:
        x, g = x.permute(NHWC)[None], g.permute(NHWC)[None]
        return _direct_weight(x, g, kernel, *window)[0].permute(OIHW)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, g, _, *ctx.window = inputs
        ctx.save_for_backward(x, g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        x, g = ctx.saved_tensors
        to_x = _InputGradient.apply(g, v, list(x.shape[2:]), *ctx.window) if ctx.needs_input_grad[0] else None
        return to_x, _Convolution.apply(x, v, *ctx.window), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, g: Tensor, *window: Any) -> tuple:
        def patch_elements(x: Tensor, g: Tensor) -> int:
            return math.prod(g.shape[1:4]) * math.prod(window[0]) * x.shape[4]

        orders = (NHWC, NHWC, OIHW)
        return _over_tasks(info, in_dims, (x, g), orders, window, patch_elements, "weight")


def convolve(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    """Images ``[B, C, H, W]`` and weight ``[O, C / groups, kh, kw]`` to ``[B, O, H', W']``."""
    return _Convolution.apply(input, weight, stride, padding, dilation, groups)


def convolve_transposed(input: Tensor, weight: Tensor, size: Ints, *window: Any) -> Tensor:
    """The transpose of :func:`convolve` in its images: ``[B, O, H', W']`` to ``[B, C, *size]``."""
    return _InputGradient.apply(input, weight, size, *window)
