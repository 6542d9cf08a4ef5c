"""How a meta-gradient that is computed inside ``training_step`` reaches the parameters.

`surrogate_loss` returns a scalar whose gradient with respect to each parameter is that parameter's meta-gradient.
Automatic optimization stays whole: backward hooks, DDP's included, clipping, accumulation and loss scaling work as for
any loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maml_lightning.errors import SettingError


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple:
        return None, None, *torch._foreach_mul(ctx.gradients, scale)


def surrogate_loss(loss: Tensor, *groups: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> Tensor:
    """The loss, with the given gradients.

    Args:
        loss: the outer loss, a scalar.
        groups: parameters and their gradients by name; parameters that require no gradient are left out.
    """
    pairs = [
        (value, gradients[name])
        for parameters, gradients in groups
        for name, value in parameters.items()
        if value.requires_grad
    ]
    if not pairs:
        raise SettingError("model.net has no parameter that is trained; unfreeze one (requires_grad_(True)).")
    values, gradients = zip(*pairs, strict=True)
    # A loss that is not finite makes the gradient so, which the other processes then see as well.
    return _Surrogate.apply(loss, (gradients[0] + 0 * loss, *gradients[1:]), *values)
