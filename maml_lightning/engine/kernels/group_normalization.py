"""Group normalization whose first and second derivative are closed forms, a few passes over memory each.

A group is some channels of one example, so no group has values of two tasks: all below is of examples alone, and
vectorized over tasks it is the same with one more dimension. The sums over positions are taken for each channel
``[..., C]``, also those of channels-last images in one pass without a copy; what a group needs of them, ``a(.)``, its
mean, is of so few numbers that it costs nothing. Instance normalization has a group for each channel.

With ``c = x - a(x)``, ``r = (a(c^2) + eps)^-1/2`` and ``n = r c`` the output is ``y = weight n + bias``, where weight
and bias are of a channel, not of a group. The derivative of ``n`` is the symmetric projection
``J = r (I - a(.) - n a(n .))``, so that with ``g`` the cotangent of ``y`` and ``h = weight g``::

    dx = J h = r weight g - r^2 a(h n) c - r a(h)         dweight = sum(g n)         dbias = sum(g)

Of these, with cotangents ``u, v, w`` and ``z = (v - r weight a(u n)) g - r a(h n) u``::

    g_bar = weight J u + v n + w
    weight_bar = sum(g J u) = r (sum(g u) - a(u) sum(g) - a(u n) sum(g n))
    x_bar = J z - r a(u J h) n

The last is the derivative of ``<u, J h>`` in ``n`` and ``r``, ``-r (a(u J h) n + a(u n) J h + a(h n) J u)``, beside
that of ``<v g, n>``, ``J (v g)``. All means in them are of the sums of ``g, g n, u, u n`` and ``u g`` over positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from maml_lightning.engine.kernels.autocast import group_norm as group_norm_of_torch
from maml_lightning.engine.kernels.last_derivative import LastDerivative
from maml_lightning.engine.kernels.layout import all_tasks_first


def _of_group(of_channels: Tensor, groups: int) -> Tensor:
    """The mean over the channels of a group, for each of its channels: ``[..., C]`` of ``[..., C]``."""
    channels = of_channels.shape[-1]
    if groups == channels:
        return of_channels
    mean = of_channels.unflatten(-1, (groups, channels // groups)).mean(-1, keepdim=True)
    return mean.expand(*mean.shape[:-1], channels // groups).flatten(-2)


def _affine(shift: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """``shift + sum(factor * values)`` of ``values [..., C, P]``; shift and factors are of channels ``[..., C]``."""
    result = shift[..., None]
    for factor, values in terms:
        result = torch.addcmul(result, values, factor[..., None])
    return result


class _Normalize(Function):
    """``y``, ``c`` and ``r`` of ``x [..., C, P]``, weight and bias ``[..., C]``, which each example has its own of."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        c = x - _of_group(x.mean(-1), groups)[..., None]
        r = (_of_group((c * c).mean(-1), groups) + eps).rsqrt()
        return _affine(bias, (weight * r, c)), c, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.groups, _ = inputs
        _, c, r = output
        ctx.mark_non_differentiable(c, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, c, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple:
        return *_NormalizeBackward.apply(g, *ctx.saved_tensors, ctx.groups), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        x, weight, bias = all_tasks_first(info, in_dims, *inputs[:3])
        return _Normalize.forward(x, weight, bias, *inputs[3:]), (0, 0, 0)


class _NormalizeBackward(Function):
    """``dx``, ``dweight`` and ``dbias`` of ``g``, and the derivative of these three."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, c: Tensor, r: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_g, sum_gn, positions = g.sum(-1), r * (g * c).sum(-1), g.shape[-1]
        mean_h, mean_hn = (_of_group(weight * value / positions, groups) for value in (sum_g, sum_gn))
        return _affine(-r * mean_h, (-r * r * mean_hn, c), (r * weight, g)), sum_gn, sum_g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        g, _, weight, c, r, ctx.groups = inputs
        _, sum_gn, sum_g = output
        ctx.save_for_backward(g, weight, c, r, sum_gn, sum_g)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        groups = ctx.groups
        tensors = (*cotangents, *ctx.saved_tensors)
        g_bar, x_bar, weight_bar = LastDerivative.apply(lambda *args: _second_derivative(groups, *args), *tensors)
        return g_bar, x_bar, weight_bar, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        g, weight, c, r = all_tasks_first(info, (in_dims[0], *in_dims[2:]), inputs[0], *inputs[2:5])
        return _NormalizeBackward.forward(g, g, weight, c, r, inputs[5]), (0, 0, 0)


def _second_derivative(
    groups: int,
    u: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    weight: Tensor,
    c: Tensor,
    r: Tensor,
    sum_gn: Tensor,
    sum_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of ``g``, ``x`` and ``weight`` from those of ``dx, dweight, dbias``; see the head of this file."""
    positions, scale = g.shape[-1], weight * r
    of_g, of_gn, of_u, of_un, of_ug = (
        value / positions for value in (sum_g, sum_gn, u.sum(-1), r * (u * c).sum(-1), (u * g).sum(-1))
    )
    mean_u, mean_un, mean_h, mean_hn, mean_uh = (
        _of_group(value, groups) for value in (of_u, of_un, weight * of_g, weight * of_gn, weight * of_ug)
    )
    mean_ujh = r * (mean_uh - mean_u * mean_h - mean_un * mean_hn)
    along_n, to_u = v - scale * mean_un, -r * mean_hn
    mean_z, mean_zn = (_of_group(along_n * a + to_u * b, groups) for a, b in ((of_g, of_u), (of_gn, of_un)))
    g_bar = _affine(w - scale * mean_u, (r * along_n, c), (scale, u))
    x_bar = _affine(-r * mean_z, (-r * r * (mean_zn + mean_ujh), c), (r * along_n, g), (r * to_u, u))
    return g_bar, x_bar, positions * r * (of_ug - mean_u * of_g - mean_un * of_gn)


def has_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether normalization of ``x`` by these weight and bias has a kernel: on a CPU, in one type of full precision."""
    full = x.dtype in (torch.float32, torch.float64) and all(t is None or t.dtype == x.dtype for t in others)
    return full and x.device.type == "cpu" and x.numel() > 0


def normalize(input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalization of ``[B, C, ...]``, of which :func:`has_kernel` holds."""
    examples, channels = input.shape[:2]
    weight = input.new_ones(channels) if weight is None else weight
    bias = input.new_zeros(channels) if bias is None else bias
    own = (value.expand(examples, channels) for value in (weight, bias))  # autograd sums their gradients up
    return _Normalize.apply(input.reshape(examples, channels, -1), *own, groups, eps)[0].reshape(input.shape)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``torch.nn.functional.group_norm``, fast in its derivatives under vmap; what torch refuses is left to torch."""
    fits = input.dim() > 1 and input.shape[1] % num_groups == 0 and input.numel() > num_groups
    if fits and has_kernel(input, weight, bias):
        return normalize(input, num_groups, weight, bias, eps)
    return group_norm_of_torch(input, num_groups, weight, bias, eps)
