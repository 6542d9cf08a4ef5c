"""iMAML: the meta-gradient at the minimum of a proximal inner objective (Rajeswaran, Finn, Kakade and Levine 2019).

The inner loop minimizes ``L_s(theta) + mu / 2 |theta - theta_0|^2`` (equation 3). At its minimum
``mu (theta_0 - theta) = grad L_s(theta)``; differentiating both sides gives ``d theta / d theta_0 = (I + H / mu)^-1``,
with the Hessian ``H`` of the support loss. So the meta-gradient is the solution ``v`` of::

    (I + H / mu) v = grad L_q(theta_S)                            (equation 7)

by conjugate gradients (algorithm 2), without a derivative of the steps: memory does not depend on their number. It
exists where ``mu`` is larger than minus the smallest eigenvalue of ``H``. With parameters ``phi`` that all tasks share,
the minimum moves by ``d theta / d phi = -(I + H / mu)^-1 (d grad L_s / d phi) / mu``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from maml_lightning.algorithms.algorithm import OF_UNROLLED_STEPS, Algorithm, Settings
from maml_lightning.algorithms.optimizers import Parameters
from maml_lightning.algorithms.steps import Setup, adapt, query_gradient, support_gradient
from maml_lightning.engine.chunks import MetaGradient, add_sum
from maml_lightning.episodes import Episode


def meta_gradient(setup: Setup, chunk: Episode, total: MetaGradient, settings: Settings) -> tuple[Tensor, Tensor]:
    """Add the implicit gradients of a chunk's tasks to ``total``; see :class:`Algorithm`."""
    support, steps, mu = (chunk.support_inputs, chunk.support_targets), setup.steps, setup.model.objects.proximal
    fast = adapt(setup, *support)
    (gradient, shared_gradient), loss, predictions = query_gradient(setup, fast, steps, chunk)
    _, pullback = setup.executor.vjp(
        setup.model.bind(support_gradient),
        ((0, None), None, 0, 0),
        (fast, setup.shared[steps]),
        setup.constants,
        *support,
    )

    def regularized(v: Parameters) -> Parameters:
        return {name: torch.add(v[name], hv, alpha=1 / mu) for name, hv in pullback(v)[0].items()}

    solution = _conjugate_gradients(regularized, gradient, settings.implicit_iterations)
    mixed = pullback(solution)[1]  # v times d grad L_s / d phi
    shared = {name: torch.add(g, mixed[name], alpha=-1 / mu) for name, g in shared_gradient.items()}
    add_sum(total.gradient, {**solution, **shared}, steps)
    return loss, predictions


def _conjugate_gradients(product: Callable[[Parameters], Parameters], b: Parameters, iterations: int) -> Parameters:
    """Solve ``product(x) = b`` for each task, ``product`` linear, symmetric and positive definite."""

    def dot(a: Parameters, b: Parameters) -> Tensor:
        """The real inner product: a complex number counts as two."""
        products = [(value.conj() * b[name]).real for name, value in a.items()]
        return torch.stack([product.reshape(len(product), -1).sum(1) for product in products]).sum(0)

    def move(a: Parameters, scale: Tensor, b: Parameters) -> Parameters:
        moved = {n: torch.addcmul(v, b[n], scale.view(-1, *[1] * (v.dim() - 1))) for n, v in a.items()}
        return {n: value.to(a[n].dtype) for n, value in moved.items()}  # parameters may have several types

    x = {name: torch.zeros_like(value) for name, value in b.items()}
    residual = direction = b
    square = dot(b, b)
    enough = square * torch.finfo(square.dtype).eps ** 2
    for _ in range(iterations):
        image, active = product(direction), square > enough
        step = torch.where(active, square / dot(direction, image), 0)
        x, residual = move(x, step, direction), move(residual, -step, image)
        before, square = square, dot(residual, residual)
        direction = move(residual, torch.where(active, square / before, 0), direction)
    return x


ALGORITHM = Algorithm(
    meta_gradient,
    unsupported={**OF_UNROLLED_STEPS, "head": "pulls each task to a shared initialization"},
    min_inner_steps=1,
    proximal=True,
    capturable=True,
    measured_as="implicit",
)
