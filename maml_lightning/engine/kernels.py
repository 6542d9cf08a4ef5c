"""Convolution and batch normalisation in forms that stay exact and fast when differentiated twice across tasks.

:class:`TaskKernels` swaps them in for ``conv2d`` and ``batch_norm`` while an ordinary ``nn.Module`` runs, so networks
need no special layers. Convolution, its gradient to the input and its gradient to the weight are three bilinear maps,
and the derivative of each is made of the other two. Under :func:`torch.func.vmap` they become matrix products of
gathered patches, batched over tasks, or direct convolutions task by task where the patches would not fit a cache;
never a grouped convolution. Batch normalisation has its first and second derivative in closed form, a few passes over
memory each. Data stays channels-last between layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, List  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.overrides import TorchFunctionMode

_Ints = List[int]  # noqa: UP006  # torch 2.6 reads no list[int] in an operator's signature

# Above this many bytes one task's patches or activations leave a core's cache: torch's own kernels, task by task, are
# then faster than batched products of patches and than passes over all tasks (benchmarks).
_CACHE_BYTES = 2**20


def _spans(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> _Ints:
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)]


# Opaque operators: one node each in a traced graph, and free to loop and to work in place inside. All is channels-last:
# images [B, H, W, C] or, task by task, [T, B, H, W, C]; weights [T, kh, kw, C, O].
@custom_op("maml_lightning::im2col", mutates_args=())
def _im2col(x: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    rows, cols = _spans(x.shape[1:3], kernel, stride, [0, 0])
    batch, height, width, channels = x.shape
    row, col = width * channels, channels  # x.stride() says anything of a dimension of size 1
    # A row of the window lies in one piece in memory: one long run to copy instead of kernel[1] short ones.
    windows = x.as_strided(
        (batch, rows, cols, kernel[0], kernel[1] * channels), (height * row, stride[0] * row, stride[1] * col, row, 1)
    )
    return windows.clone(memory_format=torch.contiguous_format).flatten(3)


@_im2col.register_fake
def _(x: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    return x.new_empty(x.shape[0], *_spans(x.shape[1:3], kernel, stride, padding), kernel[0] * kernel[1] * x.shape[3])


@custom_op("maml_lightning::col2im", mutates_args=())
def _col2im(columns: Tensor, size: _Ints, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    batch, rows, cols, _ = columns.shape
    windows = columns.reshape(batch, rows, cols, *kernel, -1)
    x = columns.new_zeros(batch, *size, windows.shape[-1])
    for i in range(kernel[0]):
        above, to_rows = _inside(i - padding[0], stride[0], rows, size[0])
        for j in range(kernel[1]):
            left, to_cols = _inside(j - padding[1], stride[1], cols, size[1])
            x[:, to_rows, to_cols] += windows[:, above, left, i, j]
    return x


def _inside(offset: int, stride: int, count: int, size: int) -> tuple[slice, slice]:
    """Which of ``count`` windows have their point at ``offset`` inside ``size``, and where it lies there."""
    first = max(0, -(offset // stride))
    last = min(count, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + offset, (last - 1) * stride + offset + 1, stride)


@_col2im.register_fake
def _(columns: Tensor, size: _Ints, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    return columns.new_empty(columns.shape[0], *size, columns.shape[3] // (kernel[0] * kernel[1]))


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _filters(w: Tensor) -> Tensor:
    return w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous()[None] if len(parts) == 1 else torch.stack(parts)


@custom_op("maml_lightning::convolution", mutates_args=())
def _direct(x: Tensor, w: Tensor, stride: _Ints, padding: _Ints) -> Tensor:
    return _stacked(
        [
            F.conv2d(_channels_first(x), _filters(w), None, stride, padding).permute(0, 2, 3, 1)
            for x, w in zip(x, w, strict=True)
        ]
    )


@_direct.register_fake
def _(x: Tensor, w: Tensor, stride: _Ints, padding: _Ints) -> Tensor:
    return x.new_empty(*x.shape[:2], *_spans(x.shape[2:4], w.shape[1:3], stride, padding), w.shape[4])


def _direct_gradients(
    g: Tensor, x: Tensor, w: Tensor, stride: _Ints, padding: _Ints, which: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        _channels_first(g), _channels_first(x), w, None, stride, padding, [1, 1], False, [0, 0], 1, which
    )


@custom_op("maml_lightning::convolution_input", mutates_args=())
def _direct_input(g: Tensor, w: Tensor, size: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    x = g.new_empty(g.shape[1], *size, w.shape[3])  # only its shape counts
    return _stacked(
        [
            _direct_gradients(g, x, _filters(w), stride, padding, [True, False, False])[0].permute(0, 2, 3, 1)
            for g, w in zip(g, w, strict=True)
        ]
    )


@_direct_input.register_fake
def _(g: Tensor, w: Tensor, size: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    return g.new_empty(*g.shape[:2], *size, w.shape[3])


@custom_op("maml_lightning::convolution_weight", mutates_args=())
def _direct_weight(x: Tensor, g: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    w = _filters(x.new_empty(*kernel, x.shape[4], g.shape[4]))  # only its shape counts
    return _stacked(
        [
            _direct_gradients(g, x, w, stride, padding, [False, True, False])[1].permute(2, 3, 1, 0)
            for x, g in zip(x, g, strict=True)
        ]
    )


@_direct_weight.register_fake
def _(x: Tensor, g: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    return x.new_empty(x.shape[0], *kernel, x.shape[4], g.shape[4])


def _tasks(tensor: Tensor, in_dim: int | None, count: int, order: tuple[int, ...] = ()) -> Tensor:
    """With a leading task dimension, and the others permuted to ``order``."""
    tensor = tensor.expand(count, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    return tensor.permute(0, *(dim + 1 for dim in order)) if order else tensor


_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # [B, C, H, W] to channels-last, and back
_HWIO, _OIHW = (2, 3, 1, 0), (3, 2, 0, 1)


def _by_task(info: Any, in_dims: tuple, *tensors: Tensor) -> list[Tensor]:
    return [_tasks(t, dim, info.batch_size).contiguous() for t, dim in zip(tensors, in_dims, strict=False)]


def _patches(x: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    """``[T, B, H, W, C] -> [T, B*H'*W', kh*kw*C]``."""
    return _im2col(x.flatten(0, 1), kernel, stride, padding).unflatten(0, x.shape[:2]).flatten(1, 3)


def _prefers_patches(images: Tensor, spans: Sequence[int], kernel: Sequence[int], channels: int) -> bool:
    rows = images.shape[1] * spans[0] * spans[1]
    columns = kernel[0] * kernel[1] * channels * images.element_size()
    return images.device.type != "cpu" or rows * columns <= _CACHE_BYTES


class _Convolution(Function):
    """``y = x * w``: images ``[B, C, H, W]``, weight ``[O, C, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, stride: _Ints, padding: _Ints) -> Tensor:
        return F.conv2d(x, w, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, *ctx.window = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        to_x = _InputGradient.apply(g, w, list(x.shape[2:]), *ctx.window) if ctx.needs_input_grad[0] else None
        to_w = _WeightGradient.apply(x, g, list(w.shape[2:]), *ctx.window) if ctx.needs_input_grad[1] else None
        return to_x, to_w, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, w: Tensor, *window: _Ints) -> tuple:
        tasks, shared = info.batch_size, in_dims[1] is None
        x, w = _tasks(x, in_dims[0], tasks, _LAST), _tasks(w, in_dims[1], tasks, _HWIO)
        kernel = list(w.shape[1:3])
        spans = _spans(x.shape[2:4], kernel, *window)
        if _prefers_patches(x, spans, kernel, w.shape[3]):
            y = _patches(x, kernel, *window).bmm(w.flatten(1, 3))
        elif shared:
            y = _direct(x.flatten(0, 1)[None], w[:1], *window)
        else:
            y = _direct(x, w, *window)
        return y.reshape(*x.shape[:2], *spans, -1).permute(0, *(dim + 1 for dim in _FIRST)), 0


class _InputGradient(Function):
    """The transpose of :class:`_Convolution` in its input: ``[B, O, H', W'] -> [B, C, H, W]``."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, size: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
        g, w = g.permute(0, 2, 3, 1)[None], w.permute(2, 3, 1, 0)[None]
        return _direct_input(g, w, size, stride, padding)[0].permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, w, _, *ctx.window = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple:
        g, w = ctx.saved_tensors
        to_g = _Convolution.apply(u, w, *ctx.window)
        return to_g, _WeightGradient.apply(u, g, list(w.shape[2:]), *ctx.window), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, g: Tensor, w: Tensor, size: _Ints, *window: _Ints) -> tuple:
        tasks, shared = info.batch_size, in_dims[1] is None
        g, w = _tasks(g, in_dims[0], tasks, _LAST), _tasks(w, in_dims[1], tasks, _HWIO)
        kernel = list(w.shape[1:3])
        if _prefers_patches(g, g.shape[2:4], kernel, w.shape[3]):
            columns = g.flatten(1, 3).bmm(w.flatten(1, 3).mT)
            x = _col2im(columns.reshape(-1, *g.shape[2:4], columns.shape[2]), size, kernel, *window)
        elif shared:
            x = _direct_input(g.flatten(0, 1)[None], w[:1], size, *window)
        else:
            x = _direct_input(g, w, size, *window)
        return x.reshape(*g.shape[:2], *size, -1).permute(0, *(dim + 1 for dim in _FIRST)), 0


class _WeightGradient(Function):
    """The transpose of :class:`_Convolution` in its weight: ``[B, C, H, W], [B, O, H', W'] -> [O, C, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, g: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
        x, g = x.permute(0, 2, 3, 1)[None], g.permute(0, 2, 3, 1)[None]
        return _direct_weight(x, g, kernel, stride, padding)[0].permute(3, 2, 0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, g, _, *ctx.window = inputs
        ctx.save_for_backward(x, g)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        x, g = ctx.saved_tensors
        to_x = _InputGradient.apply(g, v, list(x.shape[2:]), *ctx.window) if ctx.needs_input_grad[0] else None
        return to_x, _Convolution.apply(x, v, *ctx.window), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, g: Tensor, kernel: _Ints, *window: _Ints) -> tuple:
        x, g = (_tasks(t, dim, info.batch_size, _LAST) for t, dim in zip((x, g), in_dims, strict=False))
        if _prefers_patches(x, g.shape[2:4], kernel, x.shape[4]):
            w = _patches(x, kernel, *window).mT.bmm(g.flatten(1, 3))
            w = w.unflatten(1, (*kernel, -1))
        else:
            w = _direct_weight(x, g, kernel, *window)
        return w.permute(0, *(dim + 1 for dim in _OIHW)), 0


def sum_over_tasks(value: Tensor) -> Tensor:
    """``value.sum(0)``, read in the order of its memory: torch's own is 20 times slower on a permuted weight."""
    order = sorted(range(1, value.dim()), key=value.stride, reverse=True)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(0, *order).sum(0).permute(inverse)


def kernel_layout(weight: Tensor) -> Tensor:
    """A convolution's weight ``[O, C, kh, kw]`` with the memory of the matrix ``[kh*kw*C, O]``.

    Values and shape stay; all that is computed from it elementwise keeps the layout. Others pass unchanged.
    """
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) if weight.dim() == 4 else weight


def _pair(value: Any) -> _Ints:
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
    """``torch.nn.functional.conv2d``, exact and fast in its second derivative under vmap.

    Args:
        input: ``[B, C, H, W]``, best channels-last in memory. The others as in torch. Grouped, dilated, unbatched
            and string-padded convolutions are left to torch.
    """
    if groups != 1 or _pair(dilation) != [1, 1] or isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        input, weight = (t.to(torch.get_autocast_dtype(input.device.type)) for t in (input, weight))
    y = _Convolution.apply(input, weight, _pair(stride), _pair(padding))
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(values.shape[0], *(1,) * (like.dim() - 2), values.shape[1])


def _is_large(x: Tensor) -> bool:
    return x.device.type == "cpu" and x[0].numel() * x.element_size() > _CACHE_BYTES


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``n = (x - mean) * r`` and ``r = (var + eps)^-1/2`` per task and channel of ``[T, ..., C]``."""
    over = tuple(range(1, x.dim() - 1))
    centred = x - x.mean(over, keepdim=True)
    r = ((centred * centred).mean(over) + eps).rsqrt()
    return centred * _per_channel(r, x), r


@custom_op("maml_lightning::standardise", mutates_args=())
def _standardise_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _is_large(x):
        return _standardise(x, eps)
    n, r = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[-1])
    for x_t, n_t, r_t in zip(x.flatten(1, -2), n.view(x.shape[0], -1, x.shape[-1]), r, strict=True):
        out = (n_t, torch.empty_like(r_t), r_t)
        torch.native_batch_norm(x_t, None, None, None, None, True, 0.0, eps, out=out)
    return n, r


@_standardise_op.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[-1])


def _project(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``scale * (g - mean(g) - n mean(g n))``, ``sum(g n)`` and ``sum(g)`` per task and channel."""
    over, count = tuple(range(1, g.dim() - 1)), g[0, ..., 0].numel()
    sum_g, sum_gn = g.sum(over), (g * n).sum(over)
    weights = (_per_channel(w, g) for w in (sum_g * scale / -count, sum_gn * scale / -count, scale))
    mean, along_n, along_g = weights
    return torch.addcmul(torch.addcmul(mean, n, along_n), g, along_g), sum_gn, sum_g


@custom_op("maml_lightning::project", mutates_args=())
def _project_op(g: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_large(g):
        return _project(g, n, scale)
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


class _Normalise(Function):
    """``y = weight * n + bias`` with ``n = (x - mean) * r``, ``r = (var + eps)^-1/2`` over all but the last dimension.

    The projection ``J = r (I - 1 1^T / M - n n^T / M)`` is symmetric, which is all that both derivatives need.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        (n,), (r,) = _standardise_op(x.contiguous()[None], eps)
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
        return *_NormaliseBackward.apply(g, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple:
        x, weight, bias = _by_task(info, in_dims, x, weight, bias)
        n, r = _standardise_op(x, eps)
        return (torch.addcmul(_per_channel(bias, n), n, _per_channel(weight, n)), n, r), (0, 0, 0)


class _NormaliseBackward(Function):
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
        g, weight, n, r = _by_task(info, (in_dims[0], *in_dims[2:]), g, weight, n, r)
        return _project_op(g, n, weight * r), (0, 0, 0)

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
            left to torch. Half precision is normalised in float32, and comes back in half precision.
    """
    if running_mean is not None or weight is None or bias is None or not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.movedim(1, -1)
    if input.dtype in (torch.float16, torch.bfloat16):
        x, weight, bias = x.float(), weight.float(), bias.float()
    return _Normalise.apply(x, weight, bias, eps)[0].to(input.dtype).movedim(-1, 1)


def _im2col_views(x: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)


def _col2im_sum(columns: Tensor, size: _Ints, kernel: _Ints, stride: _Ints, padding: _Ints) -> Tensor:
    batch, rows, cols, _ = columns.shape
    windows = columns.view(batch, rows, 1, cols, 1, *kernel, -1)
    # Zeros between the points, then each tap moved to its place.
    spread = F.pad(windows, (0, 0, 0, 0, 0, 0, 0, stride[1] - 1, 0, 0, 0, stride[0] - 1))
    spread = spread.flatten(3, 4).flatten(1, 2)
    x = columns.new_zeros(())
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i - padding[0], j - padding[1]
            bottom, right = size[0] - top - spread.shape[1], size[1] - left - spread.shape[2]
            x = x + F.pad(spread[:, :, :, i, j], (0, 0, left, right, top, bottom))
    return x


# Inductor turns max-pooling into scalar loops, half as fast as torch's own kernels; behind these it stays a call.
@custom_op("maml_lightning::max_pool", mutates_args=())
def _max_pool(
    x: Tensor, kernel: _Ints, stride: _Ints, padding: _Ints, dilation: _Ints, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    return _aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)


@custom_op("maml_lightning::max_pool_backward", mutates_args=())
def _max_pool_backward(
    g: Tensor,
    x: Tensor,
    kernel: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    return _aten.max_pool2d_with_indices_backward(g, x, kernel, stride, padding, dilation, ceil_mode, indices)


_aten = torch.ops.aten
_max_pool.register_fake(_aten.max_pool2d_with_indices)
_max_pool_backward.register_fake(_aten.max_pool2d_with_indices_backward)


def _max_pool_call(
    x: Tensor,
    kernel: _Ints,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    return _max_pool(x, kernel, list(stride), list(padding), list(dilation), ceil_mode)


# What replaces an operator when a compiler follows: what it fuses better than it calls, and the reverse.
COMPILED: dict[OpOverload, Callable[..., Any]] = {
    _aten.max_pool2d_with_indices.default: _max_pool_call,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    torch.ops.maml_lightning.standardise.default: _standardise,
    torch.ops.maml_lightning.project.default: _project,
    torch.ops.maml_lightning.im2col.default: _im2col_views,
    torch.ops.maml_lightning.col2im.default: _col2im_sum,
}

_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: conv2d,
    F.conv2d: conv2d,
    F.batch_norm: batch_norm,
}


def _of_contiguous(pool: Callable[..., Any]) -> Callable[..., Any]:
    return lambda input, *args, **kwargs: pool(input.contiguous(), *args, **kwargs)


if torch.torch_version.TorchVersion(torch.__version__) < "2.15":
    # vmap has no second derivative of max-pooling of channels-last images there ("querying is_contiguous").
    for _name in ("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"):
        for _pool in (getattr(torch, _name, None), getattr(F, _name), getattr(F, f"{_name}_with_indices")):
            if _pool is not None:
                _REPLACEMENTS[_pool] = _of_contiguous(_pool)


class TaskKernels(TorchFunctionMode):
    """While active, calls of ``conv2d`` and ``batch_norm`` (also from ``nn`` layers) run this module's versions."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
