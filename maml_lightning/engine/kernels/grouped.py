"""The three maps of a convolution over tasks as one grouped convolution of torch's: a group, or some, for each task.

All is channels-last outside: images [T, B, H, W, C], weights [T, kh, kw, C, O]. Inside, the channels of all tasks lie
one after another: images [B, T * C, H, W], weights [T * O, C, kh, kw]. The shapes of the results are those of
``convolution.py``'s operators, which registers both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from maml_lightning.engine.kernels.layout import Ints


def _images(x: Tensor) -> Tensor:
    return x.permute(1, 0, 4, 2, 3).flatten(1, 2)


def _filters(w: Tensor) -> Tensor:
    return w.permute(0, 4, 3, 1, 2).flatten(0, 1)


def _apart(x: Tensor, tasks: int) -> Tensor:
    return x.unflatten(1, (tasks, -1)).permute(1, 0, 3, 4, 2).contiguous()


@custom_op("maml_lightning::grouped_convolution", mutates_args=())
def grouped(x: Tensor, w: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    """The convolution."""
    y = F.conv2d(_images(x), _filters(w), None, stride, padding, dilation, groups * len(x))
    return _apart(y, len(x))


def gradients(which: list[bool], g: Tensor, x: Tensor, w: Tensor, *window: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a convolution in images and weight, ``which`` are wanted; the window ends with the groups."""
    stride, padding, dilation, groups = window
    return torch.ops.aten.convolution_backward(g, x, w, None, stride, padding, dilation, False, [0, 0], groups, which)


@custom_op("maml_lightning::grouped_convolution_input", mutates_args=())
def grouped_input(g: Tensor, w: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    """Its transpose in the images."""
    x = g.new_empty(g.shape[1], len(g) * groups * w.shape[3], *size)  # only its shape counts
    window = (stride, padding, dilation, groups * len(g))
    return _apart(gradients([True, False, False], _images(g), x, _filters(w), *window)[0], len(g))


@custom_op("maml_lightning::grouped_convolution_weight", mutates_args=())
def grouped_weight(
    x: Tensor, g: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Its transpose in the weight."""
    w = x.new_empty(len(g) * g.shape[4], x.shape[4] // groups, *kernel)  # only its shape counts
    window = (stride, padding, dilation, groups * len(g))
    gradient = gradients([False, True, False], _images(g), _images(x), w, *window)[1]
    return gradient.unflatten(0, (len(g), -1)).permute(0, 3, 4, 2, 1).contiguous()
