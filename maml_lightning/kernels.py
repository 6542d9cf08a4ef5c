"""Convolution and batch normalisation in forms that stay exact and fast when differentiated twice across tasks.

:class:`TaskKernels` swaps them in for ``conv2d`` and ``batch_norm`` while an ordinary ``nn.Module`` runs, so networks
need no special layers. A convolution is a gather of patches and a matrix product, which :func:`torch.func.vmap` turns
into one batched product over all tasks instead of a grouped convolution; batch normalisation has its first and second
derivative in closed form, a few passes over memory each. Data stays channels-last between layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.overrides import TorchFunctionMode


def _spans(size: Sequence[int], kernel: list[int], stride: list[int], padding: list[int]) -> list[int]:
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


# The two gathers are opaque operators: one node each in a traced graph, and free to work in place inside.
@custom_op("maml_lightning::im2col", mutates_args=())
def _im2col(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # [B, H', W', C, kh, kw]
    columns = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
    return columns.clone() if columns.data_ptr() == x.data_ptr() else columns


@_im2col.register_fake
def _(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], *_spans(x.shape[1:3], kernel, stride, padding), kernel[0] * kernel[1] * x.shape[3])


@custom_op("maml_lightning::col2im", mutates_args=())
def _col2im(columns: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    batch, rows, cols, _ = columns.shape
    windows = columns.reshape(batch, rows, cols, *kernel, -1)
    height, width = (n + 2 * p for n, p in zip(size, padding, strict=True))
    x = columns.new_zeros(batch, height, width, windows.shape[-1])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            x[:, i : i + stride[0] * rows : stride[0], j : j + stride[1] * cols : stride[1]] += windows[:, :, :, i, j]
    return x[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].contiguous()


@_col2im.register_fake
def _(columns: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return columns.new_empty(columns.shape[0], *size, columns.shape[3] // (kernel[0] * kernel[1]))


def _over_images(function: Callable[..., Tensor], info: Any, in_dims: tuple, x: Tensor, *settings: Any) -> tuple:
    """The vmap rule of a function that treats images one by one: tasks join the image dimension."""
    y = function(x.movedim(in_dims[0], 0).flatten(0, 1), *settings)
    return y.unflatten(0, (info.batch_size, -1)), 0


class _Gather(Function):
    """Patches of images ``[B, H, W, C] -> [B, H', W', kh*kw*C]``; linear, with :class:`_Scatter` its transpose."""

    @staticmethod
    def forward(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
        return _im2col(x, kernel, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *window = inputs
        ctx.settings = (list(x.shape[1:3]), *window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Scatter.apply(grad, *ctx.settings), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _over_images(_Gather.apply, info, in_dims, *args)


class _Scatter(Function):
    """The transpose of :class:`_Gather`: each patch is added back to where it came from."""

    @staticmethod
    def forward(columns: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
        return _col2im(columns, size, kernel, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.window = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Gather.apply(grad, *ctx.window), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _over_images(_Scatter.apply, info, in_dims, *args)


def kernel_layout(weight: Tensor) -> Tensor:
    """A convolution's weight ``[O, C, kh, kw]`` with the memory of the matrix ``[kh*kw*C, O]``.

    Values and shape stay; all that is computed from it elementwise keeps the layout. Others pass unchanged.
    """
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) if weight.dim() == 4 else weight


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [int(v) for v in (*value, *value)[:2]]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` as patches times a matrix.

    Args:
        input: ``[B, C, H, W]``, best channels-last in memory. The others as in torch. Grouped, dilated, unbatched
            and string-padded convolutions are left to torch.
    """
    if groups != 1 or _pair(dilation) != [1, 1] or isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    kernel = list(weight.shape[2:])
    columns = _Gather.apply(input.permute(0, 2, 3, 1), kernel, _pair(stride), _pair(padding))
    matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
    rows = columns.flatten(0, 2)
    y = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return y.unflatten(0, columns.shape[:3]).permute(0, 3, 1, 2)


class _Normalise(Function):
    """``y = weight * n + bias`` with ``n = (x - mean) * r``, ``r = (var + eps)^-1/2`` over all but the last dimension.

    The projection ``J = r (I - 1 1^T / M - n n^T / M)`` is symmetric, which is all that both derivatives need.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        over = tuple(range(x.dim() - 1))
        centred = x - x.mean(over)
        r = ((centred * centred).mean(over) + eps).rsqrt()
        n = centred * r
        return torch.addcmul(bias, n, weight), n, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, _ = inputs
        _, n, r = output
        ctx.mark_non_differentiable(n, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, n, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple:
        return *_NormaliseBackward.apply(g, *ctx.saved_tensors), None


class _NormaliseBackward(Function):
    """``dx = weight * J g``, ``dweight = sum(g n)``, ``dbias = sum(g)``, and the derivative of these three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, weight: Tensor, n: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        over, count = tuple(range(g.dim() - 1)), g[..., 0].numel()
        sum_g, sum_gn = g.sum(over), (g * n).sum(over)
        scale = weight * r
        dx = torch.addcmul(torch.addcmul(sum_g * scale / -count, n, sum_gn * scale / -count), g, scale)
        return dx, sum_gn, sum_g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        g, _, weight, n, r = inputs
        _, sum_gn, sum_g = output
        ctx.save_for_backward(g, weight, n, r, sum_gn, sum_g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor, w: Tensor) -> tuple:
        # u, v, w: cotangents of dx, dweight, dbias. With a = mean(.) per channel:
        #   g_bar = weight * J u + v n + w
        #   x_bar = v J g - r weight (a(u J g) n + a(u n) J g + a(g n) J u)
        g, weight, n, r, sum_gn, sum_g = ctx.saved_tensors
        over, count = tuple(range(g.dim() - 1)), g[..., 0].numel()
        mean_g, mean_gn = sum_g / count, sum_gn / count
        mean_u, mean_un, mean_ug = u.sum(over) / count, (u * n).sum(over) / count, (u * g).sum(over) / count
        mean_ujg = r * (mean_ug - mean_u * mean_g - mean_un * mean_gn)
        scale = weight * r
        g_bar = torch.addcmul(torch.addcmul(w - scale * mean_u, n, v - scale * mean_un), u, scale)
        along_g, along_u = r * (v - scale * mean_un), -r * scale * mean_gn
        along_n = -scale * mean_ujg - along_g * mean_gn - along_u * mean_un
        x_bar = torch.addcmul(-along_g * mean_g - along_u * mean_u, n, along_n)
        x_bar = torch.addcmul(torch.addcmul(x_bar, g, along_g), u, along_u)
        return g_bar, x_bar, count * mean_ujg, None, None


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
    """``torch.nn.functional.batch_norm`` with the batch's own statistics, exact in its second derivative under vmap.

    Args:
        input: ``[B, C, ...]``. The others as in torch; calls with running statistics or without an affine part are
            left to torch. Half precision is normalised in float32.
    """
    if running_mean is not None or weight is None or bias is None or not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    return _Normalise.apply(x.movedim(1, -1), weight, bias, eps)[0].movedim(-1, 1)


_REPLACEMENTS = {torch.conv2d: conv2d, F.conv2d: conv2d, F.batch_norm: batch_norm}


class TaskKernels(TorchFunctionMode):
    """While active, calls of ``conv2d`` and ``batch_norm`` (also from ``nn`` layers) run this module's versions."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
