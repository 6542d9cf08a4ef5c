"""Torch's convolutions in one and two dimensions and their transposes, in terms of the kernels of ``convolution.py``.

A convolution in one dimension is one of images with a single row, and the transposed convolution is the map that takes
the gradient of a convolution's output to that of its images.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maml_lightning.devices import autocast_dtype
from maml_lightning.engine.kernels.convolution import convolve, convolve_transposed
from maml_lightning.engine.kernels.layout import Ints


def _each(value: Any, dims: int) -> Ints:
    values = [value] * dims if isinstance(value, int) else [int(v) for v in value]
    return values * dims if len(values) == 1 else values


def _as_images(function: Callable[..., Tensor], dims: int, absent: tuple[int, ...]) -> Callable[..., Tensor]:
    """``function`` of images for inputs of ``dims`` dimensions, with a batch or without; ``absent`` is for the row."""

    def call(input: Tensor, weight: Tensor, *settings: Ints, groups: int) -> Tensor:
        batched = input if input.dim() == dims + 2 else input[None]
        if dims == 1:
            settings = tuple([none, *values] for none, values in zip(absent, settings, strict=True))
            result = function(batched[:, :, None], weight[:, :, None], *settings, groups=groups).squeeze(2)
        else:
            result = function(batched, weight, *settings, groups=groups)
        return result if batched is input else result.squeeze(0)

    return call


def _typed(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(input.device.type)
    if dtype is not None and input.dtype != torch.float64:
        return input.to(dtype), weight.to(dtype)
    return input, weight


def _with_bias(y: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * dims)


def _forward(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    return convolve(input, weight, stride, padding, dilation, groups)


def _backward(
    input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, beyond: Ints, groups: int
) -> Tensor:
    each = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, beyond, strict=True)
    size = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in each]
    return convolve_transposed(input, weight, size, stride, padding, dilation, groups)


def convolution(dims: int) -> Callable[..., Tensor]:
    """``torch.conv1d`` or ``torch.conv2d``, exact and fast in its second derivative under vmap."""
    run = _as_images(_forward, dims, (1, 0, 1))

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        strides, dilations = _each(stride, dims), _each(dilation, dims)
        if padding == "same":
            spans = [d * (k - 1) for k, d in zip(weight.shape[2:], dilations, strict=True)]
            if any(span % 2 for span in spans):
                input = F.pad(input, [n for span in reversed(spans) for n in (0, span % 2)])
            paddings = [span // 2 for span in spans]
        else:
            paddings = _each(0 if padding == "valid" else padding, dims)
        return _with_bias(run(*_typed(input, weight), strides, paddings, dilations, groups=groups), bias, dims)

    return conv


def transposed_convolution(dims: int) -> Callable[..., Tensor]:
    """``torch.conv_transpose1d`` or ``torch.conv_transpose2d``, exact and fast in its second derivative under vmap."""
    run = _as_images(_backward, dims, (1, 0, 1, 0))

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        settings = (_each(value, dims) for value in (stride, padding, dilation, output_padding))
        return _with_bias(run(*_typed(input, weight), *settings, groups=groups), bias, dims)

    return conv


conv1d, conv2d = convolution(1), convolution(2)
conv_transpose1d, conv_transpose2d = transposed_convolution(1), transposed_convolution(2)
