"""A whole layer of gated recurrent units (Cho et al. 2014) or of Elman's (1990) as one operator, like ``lstm.py``.

With ``p_t = R h_{t-1} + b``, a time step is elementwise: ``h_t = f(x_t, p_t, h_{t-1})``, where ``x_t`` is the input's
part. In a GRU ``x`` and ``p`` have three parts, and ``r = sigmoid(x_r + p_r)``, ``z = sigmoid(x_z + p_z)``,
``n = tanh(x_n + r p_n)``, ``h_t = n + z (h_{t-1} - n)``; in Elman's network ``h_t = tanh(x_t + p_t)``, or its ReLU. The
partial derivatives ``X``, ``P``, ``K`` of ``f`` follow from the values, for all time steps at once. Its derivative is
backpropagation through time, with ``d_t`` the gradient of ``h_t``::

    d_{t-1} = g_{t-1} + K d_t + R^T (P d_t)      dx_t = X d_t      dR = sum_t (P d_t) h_{t-1}^T      db = sum_t P d_t

Its pullback in a direction ``u`` is, a Hessian being symmetric, the tangent of these lines along ``u``, and that of the
outputs (marked ``t_``)::

    t_h_t = X u_x + P t_p_t + K t_h_{t-1}               t_p_t = u_R h_{t-1} + u_b + R t_h_{t-1}
    t_d_{t-1} = K t_d_t + t_K d_t + R^T (P t_d_t + t_P d_t) + u_R^T (P d_t)
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from maml_lightning.engine.kernels.autocast import in_types_of_arguments
from maml_lightning.engine.kernels.last_derivative import LastDerivative, of_one_task
from maml_lightning.engine.kernels.layout import all_tasks_first
from maml_lightning.engine.kernels.lstm import before, outer, times


# Shapes: x [T, L, B, M], M of 3H in a GRU, else H; h, g, d [T, L, B, H]; h_0 [T, B, H]; R [T, M, H]; b [T, M].
def _factors(kind: str, h: Tensor, h_before: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The partial derivatives ``X``, ``P`` ``[..., M]`` and ``K`` ``[..., H]``."""
    if kind == "gru":
        r, z, n, p_n = gates.chunk(4, -1)
        to_n = (1 - z) * (1 - n * n)
        to_gates = [to_n * p_n * r * (1 - r), (h_before - n) * z * (1 - z)]
        return torch.cat([*to_gates, to_n], -1), torch.cat([*to_gates, to_n * r], -1), z
    slope = 1 - h * h if kind == "rnn_tanh" else (h > 0).to(h.dtype)
    return slope, slope, torch.zeros_like(h)


def _factor_tangents(
    kind: str, h: Tensor, h_before: Tensor, gates: Tensor, t_h: Tensor, t_h_before: Tensor, t_x: Tensor, t_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of :func:`_factors`."""
    if kind == "gru":
        r, z, n, p_n = gates.chunk(4, -1)
        (t_xr, t_xz, t_xn), (t_pr, t_pz, t_pn) = t_x.chunk(3, -1), t_p.chunk(3, -1)
        slope_r, slope_z, slope_n = r * (1 - r), z * (1 - z), 1 - n * n
        t_r, t_z = slope_r * (t_xr + t_pr), slope_z * (t_xz + t_pz)
        t_n = slope_n * (t_xn + t_r * p_n + r * t_pn)
        to_n, t_to_n = (1 - z) * slope_n, -t_z * slope_n - 2 * (1 - z) * n * t_n
        t_to_r = t_to_n * p_n * slope_r + to_n * (t_pn * slope_r + p_n * (1 - 2 * r) * t_r)
        t_to_z = (t_h_before - t_n) * slope_z + (h_before - n) * (1 - 2 * z) * t_z
        last = t_to_n * r + to_n * t_r
        return torch.cat([t_to_r, t_to_z, t_to_n], -1), torch.cat([t_to_r, t_to_z, last], -1), t_z
    t_slope = -2 * h * t_h if kind == "rnn_tanh" else torch.zeros_like(h)
    return t_slope, t_slope, torch.zeros_like(h)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.repeat(*[1] * (values.dim() - 1), like.shape[-1] // values.shape[-1])


def _narrow(values: Tensor, size: int) -> Tensor:
    """The sum of the parts of size ``H``."""
    return values.unflatten(-1, (-1, size)).sum(-2)


@custom_op("maml_lightning::recurrent_unit", mutates_args=())
@in_types_of_arguments
def _forward_op(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """All ``h_t``, and of a GRU ``r, z, n, p_n``."""
    hs, gates, to_p, bias, size = [], [], weight.mT, bias[:, None], h.shape[-1]
    if kind != "gru":
        for now in (x + bias[:, None]).unbind(1):
            p = torch.baddbmm(now, h, to_p)
            h = p.tanh() if kind == "rnn_tanh" else p.relu()
            hs.append(h)
        return torch.stack(hs, 1), x.new_empty(*x.shape[:3], 0)
    for now in x.unbind(1):
        p = torch.baddbmm(bias, h, to_p)
        (rz, n), (p_rz, p_n) = (part.split([2 * size, size], -1) for part in (now, p))
        rz = (rz + p_rz).sigmoid()
        r, z = rz.chunk(2, -1)
        n = torch.addcmul(n, r, p_n).tanh()
        h = torch.addcmul(n, z, h - n)
        hs.append(h)
        gates.append(torch.cat([rz, n, p_n], -1))
    return torch.stack(hs, 1), torch.stack(gates, 1)


@_forward_op.register_fake
def _(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    size = h.shape[-1]
    return x.new_empty(*x.shape[:3], size), x.new_empty(*x.shape[:3], 4 * size if kind == "gru" else 0)


@custom_op("maml_lightning::recurrent_unit_backward", mutates_args=())
@in_types_of_arguments
def _backward_op(
    g: Tensor, h_0: Tensor, weight: Tensor, h: Tensor, gates: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dh_0``, ``dR``, ``db`` and all ``d_t`` of the gradients of all ``h_t``."""
    h_before = before(h, h_0)
    to_x, to_p, to_h = _factors(kind, h, h_before, gates)
    d, carried = torch.empty_like(h), torch.zeros_like(h_0)
    for t in reversed(range(h.shape[1])):
        d[:, t] = now = g[:, t] + carried
        carried = torch.baddbmm(now * to_h[:, t], _wide(now, to_p) * to_p[:, t], weight)
    wide = _wide(d, to_p)
    d_p = wide * to_p
    return wide * to_x, carried, outer(d_p, h_before), d_p.sum((1, 2)), d


@_backward_op.register_fake
def _(
    g: Tensor, h_0: Tensor, weight: Tensor, h: Tensor, gates: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_x, to_bias = g.new_empty(*g.shape[:3], weight.shape[1]), weight.new_empty(weight.shape[:2])
    return to_x, h_0.new_empty(h_0.shape), weight.new_empty(weight.shape), to_bias, g.new_empty(g.shape)


@custom_op("maml_lightning::recurrent_unit_tangent", mutates_args=())
@in_types_of_arguments
def _tangent_op(
    u_x: Tensor,
    u_h: Tensor,
    u_weight: Tensor,
    u_bias: Tensor,
    h_0: Tensor,
    weight: Tensor,
    h: Tensor,
    gates: Tensor,
    d: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tangents along ``u`` of all ``h_t``, ``dx``, ``dh_0``, ``dR`` and ``db``."""
    h_before, size = before(h, h_0), h.shape[-1]
    to_x, to_p, to_h = _factors(kind, h, h_before, gates)
    t_h, t_p, now = torch.empty_like(h), torch.empty_like(u_x), u_h
    known, from_x = times(h_before, u_weight.mT) + u_bias[:, None, None], _narrow(to_x * u_x, size)
    for t in range(h.shape[1]):
        t_p[:, t] = p = torch.baddbmm(known[:, t], now, weight.mT)
        t_h[:, t] = now = from_x[:, t] + _narrow(to_p[:, t] * p, size) + to_h[:, t] * now
    t_h_before = before(t_h, u_h)
    t_to_x, t_to_p, t_to_h = _factor_tangents(kind, h, h_before, gates, t_h, t_h_before, u_x, t_p)
    wide = _wide(d, to_p)
    d_p, known_p = wide * to_p, wide * t_to_p
    known, t_d, carried = times(d_p, u_weight) + d * t_to_h, torch.empty_like(d), torch.zeros_like(u_h)
    for t in reversed(range(h.shape[1])):
        t_d[:, t] = carried
        t_d_p = torch.addcmul(known_p[:, t], _wide(carried, to_p), to_p[:, t])
        carried = torch.baddbmm(torch.addcmul(known[:, t], carried, to_h[:, t]), t_d_p, weight)
    t_wide = _wide(t_d, to_p)
    t_d_p, t_d_x = torch.addcmul(known_p, t_wide, to_p), torch.addcmul(wide * t_to_x, t_wide, to_x)
    return t_h, t_d_x, carried, outer(t_d_p, h_before) + outer(d_p, t_h_before), t_d_p.sum((1, 2))


@_tangent_op.register_fake
def _(
    u_x: Tensor, u_h: Tensor, u_weight: Tensor, u_bias: Tensor, h_0: Tensor, weight: Tensor, h: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e = (tensor.new_empty(tensor.shape) for tensor in (h, u_x, u_h, u_weight, u_bias))
    return a, b, c, d, e


class _Layer(Function):
    """``(kind, x [L, B, M], h_0 [B, H], R [M, H], b [M]) -> (h [L, B, H], gates)``."""

    @staticmethod
    def forward(kind: str, *inputs: Tensor) -> tuple:
        return tuple(of_one_task(lambda *tensors: _forward_op(*tensors, kind), *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        (ctx.kind, *tensors), (_, gates) = inputs, output
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
        return None, *_LayerBackward.apply(ctx.kind, g, *ctx.saved_tensors)[:4]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, kind: str, *inputs: Tensor) -> tuple:
        return _forward_op(*all_tasks_first(info, in_dims[1:], *inputs), kind), (0, 0)


def _backward(
    kind: str, g: Tensor, x: Tensor, h_0: Tensor, weight: Tensor, bias: Tensor, h: Tensor, gates: Tensor
) -> tuple[Tensor, ...]:
    return _backward_op(g, h_0, weight, h, gates, kind)


class _LayerBackward(Function):
    """The derivative of :class:`_Layer`, ``(dx, dh_0, dR, db)``, and all ``d_t``."""

    @staticmethod
    def forward(kind: str, *inputs: Tensor) -> tuple:
        return tuple(of_one_task(partial(_backward, kind), *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        (ctx.kind, _, _, h_0, weight, _, h, gates), d = inputs, output[-1]
        ctx.mark_non_differentiable(d)
        ctx.save_for_backward(h_0, weight, h, gates, d)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple:
        tangents = LastDerivative.apply(partial(_tangent_op, kind=ctx.kind), *directions[:4], *ctx.saved_tensors)
        return None, *tangents, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, kind: str, *inputs: Tensor) -> tuple:
        return _backward(kind, *all_tasks_first(info, in_dims[1:], *inputs)), (0,) * 5


def recurrent_layer(kind: str, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All outputs ``[L, B, H]`` of one layer in one direction.

    Args:
        kind: ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: the input's part of the gates, ``[L, B, M]`` with ``M`` of 3H in a GRU, else H.
        h: ``[B, H]``, the state before the first time step.
        weight: of the state, ``[M, H]``.
        bias: of the state's part, ``[M]``.
    """
    return _Layer.apply(kind, x, h, weight, bias)[0]
