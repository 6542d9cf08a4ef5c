"""Optimizers of the inner loop: pure functions of one task, differentiable throughout.

An inner optimizer is a pair like those of optax: ``init`` gives the state that goes with the parameters, ``update``
the next parameters and state. Its learning rates come by parameter name, each broadcastable to its parameter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
MOMENTUM = 0.9  # also Adam's beta_1
BETA_2, EPS = 0.999, 1e-4


class InnerOptimizer(NamedTuple):
    """An optimizer of the inner loop: functions of a module and partials of them, so that it can be pickled.

    Args:
        init: ``init(params) -> state``.
        update: ``update(gradient, state, params, rates) -> (params, state)``.
    """

    init: Callable[[Parameters], Any]
    update: Callable[[Parameters, Any, Parameters, Parameters], tuple[Parameters, Any]]


def _descend(params: Parameters, direction: Parameters, rates: Parameters) -> Parameters:
    """``theta - rate * direction``, in the type of ``theta``: rates and moments are wider than half precision."""
    moved = {name: torch.addcmul(value, direction[name], rates[name], value=-1) for name, value in params.items()}
    return {name: value.to(params[name].dtype) for name, value in moved.items()}


def _wide(value: Tensor) -> Tensor:
    """In float32 at least: squares of half precision overflow or vanish, and ``beta_2`` rounds to 1."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _squared(value: Tensor) -> Tensor:
    """``|g|^2``, which is real where ``g`` is complex."""
    return (value * value.conj()).real if value.is_complex() else value * value


def _zeros(params: Parameters) -> Parameters:
    return {name: torch.zeros_like(value) for name, value in params.items()}


def _nothing(params: Parameters) -> Any:
    return {}


def _sgd(gradient: Parameters, state: Any, params: Parameters, rates: Parameters) -> tuple[Parameters, Any]:
    return _descend(params, gradient, rates), state


def sgd() -> InnerOptimizer:
    """Gradient descent, ``theta - rate * g``, as in the MAML paper."""
    return InnerOptimizer(_nothing, _sgd)


def _momentum(
    gradient: Parameters, state: Any, params: Parameters, rates: Parameters, decay: float
) -> tuple[Parameters, Any]:
    state = {name: torch.add(g, state[name], alpha=decay) for name, g in gradient.items()}
    return _descend(params, state, rates), state


def momentum(decay: float = MOMENTUM) -> InnerOptimizer:
    """Heavy-ball momentum as in :class:`torch.optim.SGD`: ``b = decay * b + g``, ``theta - rate * b``."""
    return InnerOptimizer(_zeros, partial(_momentum, decay=decay))


def _adam_state(params: Parameters) -> Any:
    mean = {name: torch.zeros_like(_wide(value)) for name, value in params.items()}
    square = {name: torch.zeros_like(value.real) for name, value in mean.items()}
    return {"mean": mean, "square": square, "count": next(iter(square.values())).new_zeros(())}


def _adam(
    gradient: Parameters,
    state: Any,
    params: Parameters,
    rates: Parameters,
    beta_1: float,
    beta_2: float,
    eps: float,
) -> tuple[Parameters, Any]:
    gradient, count = {name: _wide(g) for name, g in gradient.items()}, state["count"] + 1
    mean = {name: torch.lerp(g, state["mean"][name], beta_1) for name, g in gradient.items()}
    square = {name: torch.lerp(_squared(g), state["square"][name], beta_2) for name, g in gradient.items()}
    first, second = 1 - beta_1**count, 1 - beta_2**count
    direction = {name: m / first * (square[name] / second + eps**2).rsqrt() for name, m in mean.items()}
    return _descend(params, direction, rates), {"mean": mean, "square": square, "count": count}


def adam(beta_1: float = MOMENTUM, beta_2: float = BETA_2, eps: float = EPS) -> InnerOptimizer:
    """Adam (Kingma and Ba 2015, algorithm 1) with ``sqrt(v + eps^2)`` for ``sqrt(v) + eps``.

    The square root alone has no derivative where a gradient is zero. Where gradients are much larger than ``eps``
    the first step is ``rate * sign(g)``, whose derivative is zero. Of a complex weight ``v`` is the mean of ``|g|^2``:
    its step has the direction of ``g``. (:class:`torch.optim.Adam` takes real and imaginary part for two weights.)
    """
    return InnerOptimizer(_adam_state, partial(_adam, beta_1=beta_1, beta_2=beta_2, eps=eps))


def _regularized(
    gradient: Parameters,
    state: Any,
    params: Parameters,
    rates: Parameters,
    base: Callable[..., tuple[Parameters, Any]],
    weight_decay: float,
    clip_norm: float | None,
) -> tuple[Parameters, Any]:
    if clip_norm is not None:
        square = torch.stack([_squared(_wide(g)).sum() for g in gradient.values()]).sum()
        scale = clip_norm * square.clamp_min(clip_norm**2).rsqrt()
        gradient = {name: (g * scale).to(g.dtype) for name, g in gradient.items()}
    if weight_decay:
        gradient = {name: torch.add(g, params[name], alpha=weight_decay) for name, g in gradient.items()}
    return base(gradient, state, params, rates)


def inner_optimizer(
    name: Literal["sgd", "momentum", "adam"] = "sgd", weight_decay: float = 0.0, clip_norm: float | None = None
) -> InnerOptimizer:
    """The optimizer of that name, after clipping the norm of a task's gradient and adding weight decay.

    Args:
        name: sgd, momentum or adam.
        weight_decay: factor of the parameters added to their gradient, 0 or more, as in :class:`torch.optim.SGD`.
        clip_norm: largest norm of the gradient of all parameters together, above 0; None does not clip.
    """
    base = {"sgd": sgd, "momentum": momentum, "adam": adam}[name]()
    update = partial(_regularized, base=base.update, weight_decay=weight_decay, clip_norm=clip_norm)
    return InnerOptimizer(base.init, update)


def rate_of(parameter: Tensor, inner_lr: float) -> Tensor:
    """An inner learning rate ``[1]`` for a parameter of any type, not rounded to half precision."""
    double = parameter.dtype in (torch.float64, torch.complex128)
    # Filled where it is: a copy of a number would wait for a GPU, for each parameter in each meta-step.
    return torch.full((1,), inner_lr, dtype=torch.float64 if double else torch.float32, device=parameter.device)


def rates_of(parameters: Parameters, inner_lr: float) -> Parameters:
    """:func:`rate_of` each parameter, by name; those of one type share a tensor, which is one launch on a GPU."""
    of_each_kind = {(value.dtype, value.device): value for value in parameters.values()}
    rates = {kind: rate_of(value, inner_lr) for kind, value in of_each_kind.items()}
    return {name: rates[value.dtype, value.device] for name, value in parameters.items()}
