"""Batch normalization whose first and second derivative are closed forms, a few passes over memory each.

With ``n = (x - mean) * r``, ``r = (var + eps)^-1/2`` the derivative is the projection
``J = r (I - 1 1^T / M - n n^T / M)``, where ``M`` counts the values of a channel. It is symmetric, which is all that
both derivatives need.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op
from torch.overrides import TorchFunctionMode

from maml_lightning.devices import HALF
from maml_lightning.engine.kernels.fused import fused, is_fused
from maml_lightning.engine.kernels.group_normalization import has_kernel, normalize
from maml_lightning.engine.kernels.last_derivative import LastDerivative
from maml_lightning.engine.kernels.layout import all_tasks_first, leaves_cache
from maml_lightning.task_statistics import statistics_part


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(values.shape[0], *(1,) * (like.dim() - 2), values.shape[1])


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``n = (x - mean) * r`` and ``r = (var + eps)^-1/2`` per task and channel of ``[T, ..., C]``."""
    dims = tuple(range(1, x.dim() - 1))
    centered = x - x.mean(dims, keepdim=True)
    r = ((centered * centered).mean(dims) + eps).rsqrt()
    return centered * _per_channel(r, x), r


@custom_op("maml_lightning::standardize", mutates_args=())
def _standardize_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if is_fused(x):
        return fused("triton_normalization", "standardize", standardize, x, eps)
    if not leaves_cache(x, x[0].numel()):
        return standardize(x, eps)
    n, r = x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[-1])  # contiguous, whatever x is
    for x_t, n_t, r_t in zip(x.flatten(1, -2), n.view(x.shape[0], -1, x.shape[-1]), r, strict=True):
        out = (n_t, torch.empty_like(r_t), r_t)
        # Given results, torch adds the sums of strided images to what their memory held before.
        torch.native_batch_norm(x_t.contiguous(), None, None, None, None, True, 0.0, eps, out=out)
    return n, r


@_standardize_op.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[-1])


def project(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``scale * (g - mean(g) - n mean(g n))``, ``sum(g n)`` and ``sum(g)`` per task and channel."""
    dims, count = tuple(range(1, g.dim() - 1)), g[0, ..., 0].numel()
    sum_g, sum_gn = g.sum(dims), (g * n).sum(dims)
    weights = (_per_channel(w, g) for w in (sum_g * scale / -count, sum_gn * scale / -count, scale))
    mean, along_n, along_g = weights
    return torch.addcmul(torch.addcmul(mean, n, along_n), g, along_g), sum_gn, sum_g


@custom_op("maml_lightning::project", mutates_args=())
def _project_op(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if is_fused(g):
        return fused("triton_normalization", "project", project, g, n, scale)
    if not leaves_cache(g, g[0].numel()):
        return project(g, n, scale)
    zero, one = torch.zeros_like(scale[0]), torch.ones_like(scale[0])
    results = torch.empty_like(g), torch.empty_like(scale), torch.empty_like(scale)
    for g_t, n_t, s_t, *results_t in zip(g, n, scale, *results, strict=True):
        found = torch.ops.aten.native_batch_norm_backward(
            g_t.flatten(0, -2), n_t.flatten(0, -2), s_t, None, None, zero, one, True, 0.0, [True, True, True]
        )
        for result, value in zip(results_t, found, strict=True):  # at once, while a task's values are in the cache
            result.copy_(value.view(result.shape))
    return results


@_project_op.register_fake
def _(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return g.new_empty(g.shape), g.new_empty(scale.shape), g.new_empty(scale.shape)


class _Normalize(Function):
    """``y = weight * n + bias`` with ``n = (x - mean) * r``, ``r = (var + eps)^-1/2`` over all but the last dimension.

    The projection ``J = r (I - 1 1^T / M - n n^T / M)`` is symmetric, which is all that both derivatives need.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        (n,), (r,) = _standardize_op(x.contiguous()[None], eps)
        return torch.addcmul(bias, n, weight), n.clone(), r.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, _ = inputs
        _, n, r = output
        ctx.mark_non_differentiable(n, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, n, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple:
        return *_NormalizeBackward.apply(g, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple:
        x, weight, bias = all_tasks_first(info, in_dims, x, weight, bias)
        n, r = _standardize_op(x, eps)
        return (torch.addcmul(_per_channel(bias, n), n, _per_channel(weight, n)), n, r), (0, 0, 0)


class _NormalizeBackward(Function):
    """``dx = weight * J g``, ``dweight = sum(g n)``, ``dbias = sum(g)``, and the derivative of these three."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, weight: Tensor, n: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx, sum_gn, sum_g = _project_op(g.contiguous()[None], n.contiguous()[None], (weight * r)[None])
        return dx[0].clone(), sum_gn[0].clone(), sum_g[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        g, _, weight, n, r = inputs
        _, sum_gn, sum_g = output
        ctx.save_for_backward(g, weight, n, r, sum_gn, sum_g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, g: Tensor, x: Tensor, weight: Tensor, n: Tensor, r: Tensor) -> tuple:
        g, weight, n, r = all_tasks_first(info, (in_dims[0], *in_dims[2:]), g, weight, n, r)
        return _project_op(g, n, weight * r), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        g_bar, x_bar, weight_bar = LastDerivative.apply(_second_derivative, *cotangents, *ctx.saved_tensors)
        return g_bar, x_bar, weight_bar, None, None


def second_derivative(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    weight: Tensor,
    n: Tensor,
    r: Tensor,
    sum_gn: Tensor,
    sum_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of ``g [T, ..., C]``, of ``x`` and of ``weight [T, C]`` from those of ``dx, dweight, dbias``.

    With ``u, v, w`` of these and ``a(.)`` the mean per channel::

        g_bar = weight * J u + v n + w
        x_bar = v J g - r weight (a(u J g) n + a(u n) J g + a(g n) J u)
    """
    dims, count = tuple(range(1, g.dim() - 1)), g[0, ..., 0].numel()
    mean_g, mean_gn = sum_g / count, sum_gn / count
    mean_u, mean_un, mean_ug = u.sum(dims) / count, (u * n).sum(dims) / count, (u * g).sum(dims) / count
    mean_ujg = r * (mean_ug - mean_u * mean_g - mean_un * mean_gn)
    scale = weight * r
    along_g, along_u = r * (v - scale * mean_un), -r * scale * mean_gn
    along_n = -scale * mean_ujg - along_g * mean_gn - along_u * mean_un
    of_g, along_gn, of_x, to_n, to_g, to_u, to_gu = (
        _per_channel(values, g)
        for values in (
            *(w - scale * mean_u, v - scale * mean_un, -along_g * mean_g - along_u * mean_u),
            *(along_n, along_g, along_u, scale),
        )
    )
    g_bar = torch.addcmul(torch.addcmul(of_g, n, along_gn), u, to_gu)
    x_bar = torch.addcmul(torch.addcmul(torch.addcmul(of_x, n, to_n), g, to_g), u, to_u)
    return g_bar, x_bar, count * mean_ujg


@custom_op("maml_lightning::second_derivative", mutates_args=())
def _second_derivative_op(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    weight: Tensor,
    n: Tensor,
    r: Tensor,
    sum_gn: Tensor,
    sum_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (u, v, w, g, weight, n, r, sum_gn, sum_g)
    if is_fused(u):
        return fused("triton_normalization", "second_derivative", second_derivative, *tensors)
    return second_derivative(*tensors)


@_second_derivative_op.register_fake
def _(u: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape), v.new_empty(v.shape)


def _second_derivative(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where kernels are fused one operator; elsewhere its terms, of which a graph drops those that nothing takes."""
    return (_second_derivative_op if is_fused(tensors[0]) else second_derivative)(*tensors)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, exact in its second derivative under vmap; it updates no running statistics.

    The batch's statistics are those of its :func:`~maml_lightning.task_statistics.statistics_part`.

    Args:
        input: ``[B, C, ...]``. The others as in torch; batch statistics without an affine part are left to torch. Half
            precision is normalized in float32, and comes back in half precision.
    """
    if not training and running_mean is not None and running_var is not None:
        return _with_statistics(input, running_mean, running_var, weight, bias, eps)
    if training and (part := statistics_part(input)) is not input:
        dims = (0, *range(2, input.dim()))
        part = part.float() if input.dtype in HALF else part
        mean = part.mean(dims, keepdim=True)
        return _with_statistics(input, mean.flatten(), (part - mean).square().mean(dims), weight, bias, eps)
    if weight is None or bias is None or not training:
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)
    x = input.movedim(1, -1)
    if input.dtype in HALF:
        x, weight, bias = x.float(), weight.float(), bias.float()
    return _Normalize.apply(x, weight, bias, eps)[0].to(input.dtype).movedim(-1, 1)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``, which updates no running statistics; arguments as in torch.

    Half precision is normalized in float32, and comes back in half precision.
    """
    if not use_input_stats and running_mean is not None and running_var is not None:
        return _with_statistics(input, running_mean, running_var, weight, bias, eps)
    x = input.float() if input.dtype in HALF else input
    weight, bias = (None if value is None else value.to(x.dtype) for value in (weight, bias))
    if use_input_stats and x.dim() in (3, 4) and x.shape[2:].numel() > 1 and has_kernel(x, weight, bias):
        return normalize(x, x.shape[1], weight, bias, eps).to(input.dtype)
    return F.instance_norm(x, None, None, weight, bias, use_input_stats, momentum, eps).to(input.dtype)


def _with_statistics(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """An affine map of each channel. torch's own batch normalization under vmap has a wrong second derivative."""
    scale = (var.float() if var.dtype in HALF else var).add(eps).rsqrt()
    scale, mean = scale if weight is None else scale * weight, mean.to(scale.dtype)
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(scale.dtype), mean, scale, value=-1)
    shape = (-1, *[1] * (input.dim() - 2))
    x = input.to(scale.dtype) if input.dtype in HALF else input
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(input.dtype)


class OfSupport(TorchFunctionMode):
    """While active, batch normalization takes the statistics of a part of the batch, whatever else is replaced."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))
