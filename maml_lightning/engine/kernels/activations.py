"""Activations that torch differentiates once at most, or not across tasks, in terms of operators that it does.

Hardsigmoid is ``clamp(x + 3, 0, 6) / 6``, whose second derivative is zero wherever it has one. RReLU multiplies what is
negative by a slope, in training one drawn anew for each value, else the mean of the slopes (Xu et al. 2015).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``."""
    return F.hardtanh_(input.add_(3), 0, 6).div_(6) if inplace else F.hardtanh(input + 3, 0, 6) / 6


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """``torch.nn.functional.rrelu``."""
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slopes = torch.where(input > 0, 1.0, torch.rand_like(input) * (upper - lower) + lower)
    return input.mul_(slopes) if inplace else input * slopes
