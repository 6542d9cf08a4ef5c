"""Activations that torch differentiates once at most, or not across tasks, in terms of operators that it does.

Hardsigmoid is ``clamp(x + 3, 0, 6) / 6``, whose second derivative is zero wherever it has one. RReLU multiplies what is
negative by a slope, in training one drawn anew for each value, else the mean of the slopes (Xu et al. 2015); the slopes
are those that torch's own draws, for one task after another.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maml_lightning.engine.kernels.layout import tasks_first

_NAME = "maml_lightning::rrelu_slopes"
_RANDOM = (torch.Tag.nondeterministic_seeded,)
torch.library.define(_NAME, "(Tensor x, float lower, float upper) -> Tensor", tags=_RANDOM)


@torch.library.impl(_NAME, "default")
def _slopes(x: Tensor, lower: float, upper: float) -> Tensor:
    slopes = torch.ones_like(x, memory_format=torch.contiguous_format)
    torch.ops.aten.rrelu_with_noise(x.contiguous(), slopes, lower, upper, True)
    return slopes


@torch.library.register_fake(_NAME)
def _(x: Tensor, lower: float, upper: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_vmap(_NAME)
def _(info: Any, in_dims: tuple, x: Tensor, lower: float, upper: float) -> tuple[Tensor, int]:
    return torch.ops.maml_lightning.rrelu_slopes(tasks_first(x, in_dims[0], info.batch_size), lower, upper), 0


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``."""
    return F.hardtanh_(input.add_(3), 0, 6).div_(6) if inplace else F.hardtanh(input + 3, 0, 6) / 6


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """``torch.nn.functional.rrelu``."""
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slopes = torch.ops.maml_lightning.rrelu_slopes(input.detach(), lower, upper)
    return input.mul_(slopes) if inplace else input * slopes
