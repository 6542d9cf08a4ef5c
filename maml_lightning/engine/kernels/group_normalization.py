"""Group normalization whose first and second derivative are closed forms, a few passes over memory each.

A group is some channels of one example, so no group has values of two tasks: all below is of examples alone, whichever
task they are of, and runs over some of them at a time. The sums over positions are taken for each channel ``[..., C]``,
also those of channels-last images in one pass without a copy; what a group needs of them, ``a(.)``, its mean, is of so
few numbers that it costs next to nothing. Instance normalization has a group for each channel.

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

The variance is that of ``c``, but in the derivatives ``sum(g n) = r (sum(g x) - a(x) sum(g))`` saves a pass, as in
torch's own: what it loses is what rounding of ``x`` itself changes in it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from maml_lightning.engine.kernels.autocast import group_norm as group_norm_of_torch
from maml_lightning.engine.kernels.last_derivative import LastDerivative, of_one_task
from maml_lightning.engine.kernels.layout import all_tasks_first

# So many bytes of images at a time: what is computed between the passes stays in a cache, and is not allocated anew,
# for which large tensors take longer than for the arithmetic (measured: 4 MB are faster than 1 MB and than 16 MB).
BLOCK_BYTES = 2**22

_Images = tuple[Tensor, ...] | tuple[None, ...]  # what to write to


def _of_group(of_channels: Tensor, groups: int) -> Tensor:
    """The mean over the channels of a group, for each of its channels: ``[..., C]`` of ``[..., C]``."""
    channels = of_channels.shape[-1]
    if groups == channels:
        return of_channels
    mean = of_channels.unflatten(-1, (groups, channels // groups)).mean(-1, keepdim=True)
    return mean.expand(*mean.shape[:-1], channels // groups).flatten(-2)


def _affine(out: Tensor | None, shift: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """``shift + sum(factor * values)`` of ``values [..., C, P]``; shift and factors are of channels ``[..., C]``."""
    (factor, values), *others = terms
    first_out, factor = None if others else out, factor[..., None]
    if values.stride(-1) == 1:  # torch.addcmul of two tensors that are broadcast along memory takes 4 times as long
        result = torch.add(values * factor, shift[..., None], out=first_out)
    else:
        result = torch.addcmul(shift[..., None], values, factor, out=first_out)
    for number, (factor, values) in enumerate(others, 1):
        result = torch.addcmul(result, values, factor[..., None], out=out if number == len(others) else None)
    return result


def group_standardize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: _Images = (None,)
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``a(x)`` and ``r`` of images ``x [..., C, P]``, for each of which weight and bias are ``[..., C]``."""
    mean = _of_group(x.mean(-1), groups)
    c = x - mean[..., None]
    r = (_of_group((c * c).mean(-1), groups) + eps).rsqrt()
    return _affine(out[0], bias, (weight * r, c)), mean, r


def group_project(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, r: Tensor, groups: int, out: _Images = (None,)
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx``, ``sum(g n)`` and ``sum(g)``."""
    sum_g = g.sum(-1)
    sum_gn = r * ((g * x).sum(-1) - mean * sum_g)
    mean_h, mean_hn = _of_group(torch.stack((sum_g, sum_gn)) * (weight / g.shape[-1]), groups)
    to_x = -r * r * mean_hn
    return _affine(out[0], -r * mean_h - to_x * mean, (to_x, x), (r * weight, g)), sum_gn, sum_g


def group_second_derivative(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    weight: Tensor,
    mean: Tensor,
    r: Tensor,
    sum_gn: Tensor,
    sum_g: Tensor,
    groups: int,
    out: _Images = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of ``g``, ``x`` and ``weight`` from those of ``dx, dweight, dbias``; see the head of this file."""
    positions, scale, c = g.shape[-1], weight * r, x - mean[..., None]
    of_g, of_gn, of_u, of_un, of_ug = (
        value / positions for value in (sum_g, sum_gn, u.sum(-1), r * (u * c).sum(-1), (u * g).sum(-1))
    )
    mean_u, mean_un, mean_h, mean_hn, mean_uh = (
        _of_group(value, groups) for value in (of_u, of_un, weight * of_g, weight * of_gn, weight * of_ug)
    )
    mean_ujh = r * (mean_uh - mean_u * mean_h - mean_un * mean_hn)
    to_g, to_u = v - scale * mean_un, -r * mean_hn
    mean_z, mean_zn = (_of_group(to_g * a + to_u * b, groups) for a, b in ((of_g, of_u), (of_gn, of_un)))
    g_bar = _affine(out[0], w - scale * mean_u, (r * to_g, c), (scale, u))
    x_bar = _affine(out[1], -r * mean_z, (-r * r * (mean_zn + mean_ujh), c), (r * to_g, g), (r * to_u, u))
    return g_bar, x_bar, positions * r * (of_ug - mean_u * of_g - mean_un * of_gn)


def _in_blocks(function: Callable[..., Any], images: int, x: Tensor, *others: Any) -> Any:
    """A function of all examples of all tasks, some at a time.

    Args:
        function: of tensors with a dimension over examples and of numbers; it writes images to ``out``.
        images: how many of its results are images; they come first.
        x: images ``[T, B, C, P]``.
        others: its other arguments: tensors ``[T, B, ...]``, then numbers.
    """
    tensors = [value.flatten(0, 1) for value in (x, *others) if isinstance(value, Tensor)]
    numbers, example = others[len(tensors) - 1 :], tensors[0][0]
    rows = max(BLOCK_BYTES // (example.numel() * example.element_size()), 1)
    if rows >= len(tensors[0]):
        results = function(*tensors, *numbers)
    else:
        whole = [torch.empty_like(tensors[0]) for _ in range(images)]
        blocks = zip(*(value.split(rows) for value in (*whole, *tensors)), strict=True)
        parts = [function(*block[images:], *numbers, out=block[:images]) for block in blocks]
        results = [*whole, *(torch.cat(part) for part in list(zip(*parts, strict=True))[images:])]
    return tuple(result.unflatten(0, x.shape[:2]) for result in results)


def _standardize_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: _Images = (None,)
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`group_standardize` gives, by an operator that takes channels-last images if they have two sides."""
    examples, channels, positions = x.shape
    n, mean, r = torch.native_group_norm(x.unsqueeze(2), None, None, examples, channels, positions, groups, eps)
    mean, r = (value.repeat_interleave(channels // groups, 1) for value in (mean, r))
    return _affine(out[0], bias, (weight, n.squeeze(2))), mean, r


@custom_op("maml_lightning::group_standardize", mutates_args=())
def _standardize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # Torch's own is fast where the values of a group are side by side in memory.
    by_torch = groups == 1 or x.stride(-1) == 1
    return _in_blocks(_standardize_by_torch if by_torch else group_standardize, 1, x, weight, bias, groups, eps)


@custom_op("maml_lightning::group_project", mutates_args=())
def _project(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, r: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _in_blocks(group_project, 1, x, g, weight, mean, r, groups)


@_standardize.register_fake
@_project.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])


@custom_op("maml_lightning::group_second_derivative", mutates_args=())
def _second_derivative(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    weight: Tensor,
    mean: Tensor,
    r: Tensor,
    sum_gn: Tensor,
    sum_g: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _in_blocks(group_second_derivative, 2, x, u, v, w, g, weight, mean, r, sum_gn, sum_g, groups)


@_second_derivative.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1])


class _Normalize(Function):
    """``y``, ``a(x)`` and ``r`` of ``x [B, C, P]``; each example has a weight and bias of its own, ``[B, C]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
        return tuple(of_one_task(lambda *tensors: _standardize(*tensors, groups, eps), x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.groups, _ = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple:
        return *_NormalizeBackward.apply(*ctx.saved_tensors, g, ctx.groups), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        *tensors, groups, eps = inputs
        return _standardize(*all_tasks_first(info, in_dims, *tensors), groups, eps), (0, 0, 0)


class _NormalizeBackward(Function):
    """``dx``, ``dweight`` and ``dbias`` of ``g``, and the derivative of these three."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, g: Tensor, groups: int) -> tuple[Tensor, ...]:
        return tuple(of_one_task(lambda *tensors: _project(*tensors, groups), x, g, weight, mean, r))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, mean, r, g, ctx.groups = inputs
        _, sum_gn, sum_g = output
        ctx.save_for_backward(x, g, weight, mean, r, sum_gn, sum_g)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        groups, (x, *saved) = ctx.groups, ctx.saved_tensors

        def derivative(*tensors: Tensor) -> Any:
            return _second_derivative(*tensors, groups)

        g_bar, x_bar, weight_bar = LastDerivative.apply(derivative, x, *cotangents, *saved)
        return x_bar, weight_bar, None, None, g_bar, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        *tensors, groups = inputs
        x, weight, mean, r, g = all_tasks_first(info, in_dims, *tensors)
        return _project(x, g, weight, mean, r, groups), (0, 0, 0)


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
    fits = input.dim() in (3, 4) and input.shape[1] % num_groups == 0 and input.numel() > num_groups
    if fits and has_kernel(input, weight, bias):
        return normalize(input, num_groups, weight, bias, eps)
    return group_norm_of_torch(input, num_groups, weight, bias, eps)
