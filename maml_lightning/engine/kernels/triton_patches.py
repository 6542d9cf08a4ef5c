"""The gathering and scattering of patches (``patches.py``) in Triton, one kernel each. Importing needs Triton."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from maml_lightning.engine.kernels.layout import Ints, spans

_ELEMENTS = 1024  # of a program


@triton.jit(do_not_specialize=["total"])
def _im2col(
    x,
    columns,
    total,
    height,
    width,
    channels,
    rows,
    cols,
    k0: tl.constexpr,
    k1: tl.constexpr,
    s0: tl.constexpr,
    s1: tl.constexpr,
    p0: tl.constexpr,
    p1: tl.constexpr,
    block: tl.constexpr,
):
    """Each number of the patches ``[B, rows, cols, k0, k1, C]`` from its place in the images."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < total
    c, rest = index % channels, index // channels
    kj, rest = rest % k1, rest // k1
    ki, rest = rest % k0, rest // k0
    j, rest = rest % cols, rest // cols
    i, b = rest % rows, rest // rows
    h, w = i * s0 + ki - p0, j * s1 + kj - p1
    there = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    tl.store(columns + index, tl.load(x + ((b * height + h) * width + w) * channels + c, there, 0.0), inside)


@triton.jit(do_not_specialize=["total"])
def _col2im(
    columns,
    x,
    total,
    height,
    width,
    channels,
    rows,
    cols,
    k0: tl.constexpr,
    k1: tl.constexpr,
    s0: tl.constexpr,
    s1: tl.constexpr,
    p0: tl.constexpr,
    p1: tl.constexpr,
    block: tl.constexpr,
):
    """Each number of the images: the sum of its places in the patches."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < total
    c, rest = index % channels, index // channels
    w, rest = rest % width, rest // width
    h, b = rest % height, rest // height
    found = tl.zeros([block], tl.float32)
    for ki in tl.static_range(k0):
        for kj in tl.static_range(k1):
            a, d = h + p0 - ki, w + p1 - kj
            i, j = a // s0, d // s1
            there = inside & (a >= 0) & (a % s0 == 0) & (i < rows) & (d >= 0) & (d % s1 == 0) & (j < cols)
            place = ((((b * rows + i) * cols + j) * k0 + ki) * k1 + kj) * channels + c
            found += tl.load(columns + place, there, 0.0).to(tl.float32)
    tl.store(x + index, found.to(x.dtype.element_ty), inside)


def _window(kernel: Ints, stride: Ints, padding: Ints) -> dict[str, Any]:
    names = {"k": kernel, "s": stride, "p": padding}
    return {f"{name}{i}": pair[i] for name, pair in names.items() for i in range(2)} | {"block": _ELEMENTS}


def im2col(x: Tensor, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """``im2col`` of ``patches.py``."""
    batch, height, width, channels = x.shape
    size = spans(x.shape[1:3], kernel, stride, padding)
    columns = x.new_empty(batch, *size, kernel[0] * kernel[1] * channels)
    grid = (triton.cdiv(columns.numel(), _ELEMENTS),)
    numbers = (columns.numel(), height, width, channels, *size)
    _im2col[grid](x.contiguous(), columns, *numbers, **_window(kernel, stride, padding))
    return columns


def col2im(columns: Tensor, size: Ints, kernel: Ints, stride: Ints, padding: Ints) -> Tensor:
    """``col2im`` of ``patches.py``."""
    batch, rows, cols, _ = columns.shape
    x = columns.new_empty(batch, *size, columns.shape[3] // (kernel[0] * kernel[1]))
    grid = (triton.cdiv(x.numel(), _ELEMENTS),)
    numbers = (x.numel(), *size, x.shape[3], rows, cols)
    _col2im[grid](columns.contiguous(), x, *numbers, **_window(kernel, stride, padding))
    return x
