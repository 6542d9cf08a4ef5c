"""Gathering the patches under a convolution's windows, and the transpose of that; channels-last."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from maml_lightning.engine.kernels.fused import fused, is_fused
from maml_lightning.engine.kernels.layout import Ints, spans


# Opaque operators: one node each in a traced graph, and free to loop and to work in place inside.
@custom_op("maml_lightning::im2col", mutates_args=())
def im2col(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """Images ``[B, H, W, C]`` to the patches under each window, ``[B, H', W', kh * kw * C]``."""
    size = spans(x.shape[1:3], kernel, stride, padding)
    if is_fused(x, len(x) * math.prod([*size, *kernel, x.shape[3]])):
        return fused("triton_patches", "im2col", _gathered, x, kernel, stride, padding)
    return _gathered(x, kernel, stride, padding)


def _gathered(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    rows, cols = spans(x.shape[1:3], kernel, stride, [0, 0])
    batch, height, width, channels = x.shape
    row, col = width * channels, channels  # x.stride() says anything of a dimension of size 1
    # A row of the window lies in one piece in memory: one long run to copy instead of kernel[1] short ones.
    windows = x.as_strided(
        (batch, rows, cols, kernel[0], kernel[1] * channels), (height * row, stride[0] * row, stride[1] * col, row, 1)
    )
    return windows.clone(memory_format=torch.contiguous_format).flatten(3)


@im2col.register_fake
def _(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    return x.new_empty(x.shape[0], *spans(x.shape[1:3], kernel, stride, padding), kernel[0] * kernel[1] * x.shape[3])


@custom_op("maml_lightning::col2im", mutates_args=())
def col2im(columns: Tensor, size: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """Its transpose: patches, added up where they overlap, to images of a size."""
    if is_fused(columns):
        return fused("triton_patches", "col2im", _scattered, columns, size, kernel, stride, padding)
    return _scattered(columns, size, kernel, stride, padding)


def _scattered(columns: Tensor, size: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    batch, rows, cols, _ = columns.shape
    windows = columns.reshape(batch, rows, cols, *kernel, -1)
    x = columns.new_zeros(batch, *size, windows.shape[-1])
    for i in range(kernel[0]):
        above, to_rows = _inside(i - padding[0], stride[0], rows, size[0])
        for j in range(kernel[1]):
            left, to_cols = _inside(j - padding[1], stride[1], cols, size[1])
            x[:, to_rows, to_cols] += windows[:, above, left, i, j]
    return x


def _inside(offset: int, stride: int, count: int, size: int) -> tuple[slice, slice]:
    """Which of ``count`` windows have their point at ``offset`` inside ``size``, and where it lies there."""
    first = max(0, -(offset // stride))
    last = min(count, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + offset, (last - 1) * stride + offset + 1, stride)


@col2im.register_fake
def _(columns: Tensor, size: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    return columns.new_empty(columns.shape[0], *size, columns.shape[3] // (kernel[0] * kernel[1]))


COL2IM = torch.ops.maml_lightning.col2im.default


# The gathering and scattering of patches as a compiler fuses them.
def im2col_views(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """``im2col`` in terms of torch."""
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)


def col2im_sum(columns: Tensor, size: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """``col2im`` in terms of torch."""
    batch, rows, cols, _ = columns.shape
    windows = columns.view(batch, rows, 1, cols, 1, *kernel, -1)
    # Zeros between the points, then each tap moved to its place.
    spread = F.pad(windows, (0, 0, 0, 0, 0, 0, 0, stride[1] - 1, 0, 0, 0, stride[0] - 1))
    spread = spread.flatten(3, 4).flatten(1, 2)
    x = columns.new_zeros(())
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i - padding[0], j - padding[1]
            bottom, right = size[0] - top - spread.shape[1], size[1] - left - spread.shape[2]
            x = x + F.pad(spread[:, :, :, i, j], (0, 0, left, right, top, bottom))
    return x
