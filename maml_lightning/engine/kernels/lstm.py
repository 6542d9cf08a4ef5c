"""A whole LSTM layer as one operator: its derivative and the derivative of that are loops over time, one operator each.

With gates ``a_t = x_t + R h_{t-1}``, where ``x_t`` is the input's part, and their activations ``i, f, g, o``::

    c_t = f c_{t-1} + i g          s_t = tanh c_t          h_t = o s_t

The derivative is backpropagation through time: with ``dh_t`` from the output and from ``a_{t+1}``::

    dc_t = dc_{t+1} f_{t+1} + dh_t o (1 - s^2)             da_t = (dc g, dc c_{t-1}, dc i, dh s) * activation'
    dh_{t-1} = R^T da_t            dR = sum_t da_t h_{t-1}^T

Its pullback in a direction ``u`` needs no third loop of another kind. A Hessian is symmetric: what ``u`` gives with
respect to the arguments is the tangent of these derivatives along ``u``, and with respect to the gradients of the
outputs it is the tangent of the outputs. Both are the lines above, each differentiated along ``u`` (marked ``t_``).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from maml_lightning.engine.kernels.autocast import in_types_of_arguments
from maml_lightning.engine.kernels.last_derivative import LastDerivative, of_one_task
from maml_lightning.engine.kernels.layout import all_tasks_first


# Shapes: x, gates [T, L, B, 4H]; h, c [T, L, B, H]; h_0, c_0 [T, B, H]; weight R [T, 4H, H].
def before(values: Tensor, first: Tensor) -> Tensor:
    """The values one time step earlier."""
    return torch.cat([first[:, None], values[:, :-1]], 1)


def times(values: Tensor, weight: Tensor) -> Tensor:
    """``[T, L, B, M] @ [T, M, N]`` for all time steps in one product."""
    return values.flatten(1, 2).bmm(weight).unflatten(1, values.shape[1:3])


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The products ``a^T b``, ``[T, M, N]``, summed over time and batch."""
    return a.flatten(1, 2).mT.bmm(b.flatten(1, 2))


def _slopes(gates: Tensor) -> Tensor:
    """The derivatives of the activations, in terms of their values."""
    i, f, g, o = gates.chunk(4, -1)
    return torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)


@custom_op("maml_lightning::lstm", mutates_args=())
@in_types_of_arguments
def _forward_op(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ``h_t`` and ``c_t``, and the activated gates."""
    hs, cs, gates, to_gates = [], [], [], weight.mT
    for now in x.unbind(1):
        i, f, g, o = torch.baddbmm(now, h, to_gates).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(f * c, i, g)
        h = o * c.tanh()
        hs.append(h)
        cs.append(c)
        gates.append(torch.cat([i, f, g, o], -1))
    return torch.stack(hs, 1), torch.stack(cs, 1), torch.stack(gates, 1)


@_forward_op.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    states = (*x.shape[:3], h.shape[-1])
    return x.new_empty(states), x.new_empty(states), x.new_empty(x.shape)


@custom_op("maml_lightning::lstm_backward", mutates_args=())
@in_types_of_arguments
def _backward_op(
    g_h: Tensor, g_c: Tensor, c_0: Tensor, weight: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``da_t``, ``dh_0`` and ``dc_0`` of the gradients of all ``h_t`` and of the last ``c_t``."""
    s, (i, f, g, o) = c.tanh(), gates.chunk(4, -1)
    to_c, factors = o * (1 - s * s), torch.cat([g, before(c, c_0), i], -1)
    slopes = _slopes(gates)
    d_a, d_h, d_c = torch.empty_like(gates), torch.zeros_like(c_0), g_c
    for t in reversed(range(g_h.shape[1])):
        d_h = g_h[:, t] + d_h
        d_c = torch.addcmul(d_c, d_h, to_c[:, t])
        d_a[:, t] = torch.cat([d_c.repeat(1, 1, 3) * factors[:, t], d_h * s[:, t]], -1) * slopes[:, t]
        d_c, d_h = d_c * f[:, t], d_a[:, t].bmm(weight)
    return d_a, d_h, d_c.clone()


@_backward_op.register_fake
def _(g_h: Tensor, g_c: Tensor, c_0: Tensor, weight: Tensor, c: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gates.new_empty(gates.shape), c_0.new_empty(c_0.shape), c_0.new_empty(c_0.shape)


@custom_op("maml_lightning::lstm_tangent", mutates_args=())
@in_types_of_arguments
def _tangent_op(
    u_x: Tensor,
    u_h: Tensor,
    u_c: Tensor,
    u_weight: Tensor,
    g_h: Tensor,
    g_c: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    d_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tangents along ``u`` of all ``h_t``, the last ``c_t``, ``da_t``, ``dh_0``, ``dc_0`` and ``dR``."""
    s, (i, f, g, o), slopes = c.tanh(), gates.chunk(4, -1), _slopes(gates)
    h_before, c_before, to_s = before(h, h_0), before(c, c_0), 1 - s * s
    t_h, t_c, t_gates = torch.empty_like(h), torch.empty_like(c), torch.empty_like(gates)
    known, at_h, at_c = u_x + times(h_before, u_weight.mT), u_h, u_c
    for t in range(h.shape[1]):
        t_gates[:, t] = torch.baddbmm(known[:, t], at_h, weight.mT) * slopes[:, t]
        t_i, t_f, t_g, t_o = t_gates[:, t].chunk(4, -1)
        at_c = t_f * c_before[:, t] + f[:, t] * at_c + t_i * g[:, t] + i[:, t] * t_g
        at_h = t_o * s[:, t] + o[:, t] * to_s[:, t] * at_c
        t_h[:, t], t_c[:, t] = at_h, at_c
    return (
        t_h,
        at_c.clone(),
        *_tangent_backward(
            t_h, t_c, t_gates, u_h, u_c, u_weight, g_h, g_c, weight, (h_before, c_before, s, gates, slopes, d_a)
        ),
    )


def _tangent_backward(
    t_h: Tensor,
    t_c: Tensor,
    t_gates: Tensor,
    u_h: Tensor,
    u_c: Tensor,
    u_weight: Tensor,
    g_h: Tensor,
    g_c: Tensor,
    weight: Tensor,
    known: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_before, c_before, s, gates, slopes, d_a = known
    (i, f, g, o), (t_i, t_f, t_g, t_o) = gates.chunk(4, -1), t_gates.chunk(4, -1)
    t_s, to_c, zero = (1 - s * s) * t_c, o * (1 - s * s), torch.zeros_like(u_h)
    t_to_c = t_o * (1 - s * s) - 2 * o * s * t_s
    factors, t_factors = torch.cat([g, c_before, i], -1), torch.cat([t_g, before(t_c, u_c), t_i], -1)
    # The tangent of slope(a) is that of its value: (1 - 2 i) t_i for a sigmoid, -2 g t_g for tanh.
    t_slopes = torch.cat([(1 - 2 * i) * t_i, (1 - 2 * f) * t_f, -2 * g * t_g, (1 - 2 * o) * t_o], -1)
    d_h = g_h + torch.cat([times(d_a, weight)[:, 1:], zero[:, None]], 1)
    from_weight = times(d_a, u_weight)
    t_d_a, t_d_h, t_d_c, d_c = torch.empty_like(gates), zero, zero, g_c
    for t in reversed(range(s.shape[1])):
        d_c = torch.addcmul(d_c, d_h[:, t], to_c[:, t])
        t_d_c = t_d_c + t_d_h * to_c[:, t] + d_h[:, t] * t_to_c[:, t]
        three, t_three = d_c.repeat(1, 1, 3), t_d_c.repeat(1, 1, 3)
        d_gates = torch.cat([three * factors[:, t], d_h[:, t] * s[:, t]], -1)
        t_d_gates = torch.cat(
            [t_three * factors[:, t] + three * t_factors[:, t], t_d_h * s[:, t] + d_h[:, t] * t_s[:, t]], -1
        )
        t_d_a[:, t] = t_d_gates * slopes[:, t] + d_gates * t_slopes[:, t]
        t_d_c = t_d_c * f[:, t] + d_c * t_f[:, t]
        d_c = d_c * f[:, t]
        t_d_h = torch.baddbmm(from_weight[:, t], t_d_a[:, t], weight)
    t_d_weight = outer(t_d_a, h_before) + outer(d_a, before(t_h, u_h))
    return t_d_a, t_d_h, t_d_c.clone(), t_d_weight


@_tangent_op.register_fake
def _(
    u_x: Tensor, u_h: Tensor, u_c: Tensor, u_weight: Tensor, g_h: Tensor, g_c: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = (g_h, g_c, u_x, u_h, u_c, u_weight)
    a, b, c, d, e, f = (tensor.new_empty(tensor.shape) for tensor in like)
    return a, b, c, d, e, f


def _forward(x: Tensor, h_0: Tensor, c_0: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    h, c, gates = _forward_op(x, h_0, c_0, weight)
    return h, c[:, -1].clone(), c, gates


@in_types_of_arguments
def _backward(
    g_h: Tensor, g_c: Tensor, x: Tensor, h_0: Tensor, c_0: Tensor, weight: Tensor, h: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, ...]:
    d_a, d_h, d_c = _backward_op(g_h, g_c, c_0, weight, c, gates)
    return d_a, d_h, d_c, outer(d_a, before(h, h_0))


class _Layer(Function):
    """``(x [L, B, 4H], h_0, c_0 [B, H], R [4H, H]) -> (h [L, B, H], the last c, all c, gates)``."""

    @staticmethod
    def forward(*inputs: Tensor) -> tuple:
        return tuple(of_one_task(_forward, *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        h, _, c, gates = output
        ctx.mark_non_differentiable(c, gates)
        ctx.save_for_backward(*inputs, h, c, gates)

    @staticmethod
    def backward(ctx: Any, g_h: Tensor, g_c: Tensor, *_: Tensor) -> tuple:
        return _LayerBackward.apply(g_h, g_c, *ctx.saved_tensors)[:4]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Tensor) -> tuple:
        return _forward(*all_tasks_first(info, in_dims, *inputs)), (0, 0, 0, 0)


class _LayerBackward(Function):
    """The derivative of :class:`_Layer`, ``(d_a, d_h_0, d_c_0, d_R)``."""

    @staticmethod
    def forward(*inputs: Tensor) -> tuple:
        return tuple(of_one_task(_backward, *inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        g_h, g_c, _, h_0, c_0, weight, h, c, gates = inputs
        ctx.save_for_backward(g_h, g_c, h_0, c_0, weight, h, c, gates, output[0])

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple:
        return *LastDerivative.apply(_tangent_op, *directions, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Tensor) -> tuple:
        return _backward(*all_tasks_first(info, in_dims, *inputs)), (0, 0, 0, 0)


def lstm_layer(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All outputs, the last output and the last cell state of one layer in one direction.

    Args:
        x: the input's part of the gates, ``[L, B, 4H]``.
        h: ``[B, H]``, like ``c``: the state before the first time step.
        weight: of the state, ``[4H, H]``.
    """
    outputs, last, *_ = _Layer.apply(x, h, c, weight)
    return outputs, outputs[-1], last
