"""MAML: the exact meta-gradient, by differentiating through the inner steps (Finn, Abbeel and Levine 2017).

The outer loss is ``sum_k w_k L_q(theta_k)``; MAML has ``w_S = 1`` and all others 0, MAML++ anneals them
(Antoniou, Edwards and Storkey 2019). Its gradient is a sweep backwards with one adjoint ``lambda``, the size of the
adapted parameters, where ``H_k`` is the Hessian of the support loss, never formed::

    lambda_S = w_S grad L_q(theta_S)
    d / d alpha_k = -lambda_{k+1} * grad L_s(theta_k)
    lambda_k = lambda_{k+1} - H_k (alpha_k * lambda_{k+1}) + w_k grad L_q(theta_k)
    meta-gradient = mean over tasks of lambda_0

Each product with ``H_k`` is the pullback of the inner step, so that the same sweep holds for momentum and Adam, whose
state has an adjoint of its own. FOMAML drops the ``H_k`` term, ANIL and BOIL adapt a part of the parameters, Meta-SGD
and LSLR learn ``alpha``, Meta-Curvature matrices beside it. The pullback also yields the gradients of what all tasks
share.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.algorithm import Algorithm, Settings
from maml_lightning.algorithms.model import query_loss
from maml_lightning.algorithms.optimizers import Parameters
from maml_lightning.algorithms.prototypes import of_task, with_pullback
from maml_lightning.algorithms.steps import Setup, first_order_step, query_gradient, step
from maml_lightning.engine.chunks import MetaGradient, add_sum
from maml_lightning.episodes import Episode
from maml_lightning.structures import tasks_of


def meta_gradient(setup: Setup, chunk: Episode, total: MetaGradient, settings: Settings) -> tuple[Tensor, Tensor]:
    """Add the meta-gradients of a chunk's tasks to ``total``; see :class:`Algorithm`."""
    steps = setup.steps
    weights = settings.weights or [0.0] * steps + [1.0]
    # One task's memory; recomputing its steps would repeat effects.
    if setup.executor.way(setup.model, chunk.tasks) == "loop":
        return _by_loop(setup, chunk, total, settings.first_order, weights)
    setup, pullback_of_start = with_pullback(setup, chunk)
    trajectory, pullbacks, state = _forward(setup, chunk, settings.first_order)
    (gradient, shared_gradient), loss, predictions = _weighted(setup, trajectory.pop(), steps, chunk, weights)
    add_sum(total.gradient, shared_gradient, steps)
    adjoint: Any = (gradient, pytree.tree_map(torch.zeros_like, state))
    for k in reversed(range(steps)):
        adjoint, gradients = pullbacks.pop()(adjoint)
        add_sum(total.rates, gradients.get("learned", {}), k)
        for name in ("shared", "initial"):
            add_sum(total.gradient, gradients.get(name, {}), k)
        fast = trajectory.pop()
        if weights[k]:
            (gradient, shared_gradient), value, _ = _weighted(setup, fast, k, chunk, weights)
            loss = loss + value
            add_sum(total.gradient, shared_gradient, k)
            adjoint = ({name: lam + gradient[name] for name, lam in adjoint[0].items()}, adjoint[1])
    for gradient in pullback_of_start(adjoint):
        add_sum(total.gradient, gradient, 0)
    return loss, predictions


def _by_loop(
    setup: Setup, chunk: Episode, total: MetaGradient, first_order: bool, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The same in a loop over tasks, where autograd sweeps through all steps at once, as in any training loop."""
    model, constants = setup.model.objects, setup.constants
    run_step = first_order_step if first_order else step
    parts = [setup.initial, *setup.shared, *setup.learned]
    # What several steps share is one leaf. Autograd adds the gradients of the tasks up in it.
    values = {id(v): v.contiguous().detach().requires_grad_() for part in parts for v in part.values()}
    initial, *others = ({name: values[id(value)] for name, value in part.items()} for part in parts)
    setup = setup._replace(initial=initial, shared=others[: setup.steps + 1], learned=others[setup.steps + 1 :])

    def objective(task: Episode) -> tuple[Tensor, Tensor]:
        support, beside, losses = (task.support_inputs, task.support_targets), setup.beside_queries(task), []
        own = of_task(setup, *support)
        state, arguments = own.initial_state(), own.arguments()
        for k, weight in enumerate(weights):
            if weight or k == setup.steps:
                queries = (task.query_inputs, task.query_targets, beside)
                loss, predictions = query_loss(model, state[0], setup.shared[k], constants, *queries)
                losses.append(loss if weight == 1 else weight * loss)
            if k < setup.steps:
                state = run_step(model, (state, {}), arguments[k], constants, *support)
        return sum(losses[1:], losses[0]), predictions

    results = []
    with setup.executor.looping(setup.model):
        for task in tasks_of(chunk):
            with torch.enable_grad():
                loss, predictions = objective(task)
            if loss.requires_grad:
                torch.autograd.backward(loss, inputs=[*values.values()])
            results.append((loss.detach(), predictions.detach()))
    sums = {key: value.grad for key, value in values.items() if value.grad is not None}
    totals = [total.gradient] * (2 + setup.steps) + [total.rates] * setup.steps
    for part, target, k in zip(parts, totals, [0, *range(setup.steps + 1), *range(setup.steps)], strict=True):
        add_sum(target, {n: sums.pop(id(v)).to_dense()[None] for n, v in part.items() if id(v) in sums}, k)
    losses, outputs = zip(*results, strict=True)
    return torch.stack(losses), torch.stack(outputs)


def _forward(
    setup: Setup, chunk: Episode, first_order: bool
) -> tuple[list[Parameters], list[Callable[[Any], Any]], Any]:
    """``theta_0 … theta_S``, the pullback of each step, and the optimizer's state after the last."""
    traced_step = setup.model.bind(first_order_step if first_order else step)
    with_gradient = {
        "shared": not first_order and bool(setup.shared[0]),
        "rates": False,
        "learned": any(setup.learned),
        "initial": bool(setup.model.objects.proximal),
    }
    state = setup.start(chunk.tasks)
    trajectory, pullbacks = [state[0]], []
    for k, arguments in enumerate(setup.arguments()):
        differentiable = {name: value for name, value in arguments.items() if with_gradient[name]}
        fixed = {name: value for name, value in arguments.items() if not with_gradient[name]}
        before = setup.executor.kept_bytes
        state, pullback = setup.executor.vjp(
            traced_step,
            ((setup.task_dim(k), None), None, None, 0, 0),
            (state, differentiable),
            fixed,
            setup.constants,
            chunk.support_inputs,
            chunk.support_targets,
            recompute=setup.flat_memory.active and not first_order and k < setup.steps - 1,
        )
        trajectory.append(state[0])
        pullbacks.append(pullback)
        if k == 0:
            kept = setup.executor.kept_bytes - before
            setup.flat_memory.decide(kept, setup.steps, chunk.device)
    return trajectory, pullbacks, state[1]


def _weighted(setup: Setup, fast: Parameters, k: int, chunk: Episode, weights: Any) -> tuple[Any, Tensor, Tensor]:
    """``w_k`` times the gradients of the query loss, ``w_k`` times the loss, and the predictions."""
    gradients, loss, predictions = query_gradient(setup, fast, k, chunk)
    if weights[k] != 1:
        gradients = pytree.tree_map(lambda gradient: gradient * weights[k], gradients)
    return gradients, weights[k] * loss, predictions


def multi_step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """Weights ``w_0 … w_S`` of MAML++'s multi-step loss, annealed to the last step (Antoniou et al. 2019, section 4).

    Each of ``theta_1 … theta_S`` begins at ``1 / S``; those before the last fall linearly to 0.03 / S within
    ``epochs`` epochs, and the last takes what they lose. With 0 epochs only the last counts.

    Example:
        >>> multi_step_weights(steps=2, epoch=0, epochs=10)
        [0.0, 0.5, 0.5]
    """
    if steps == 0 or epochs == 0:
        return [0.0] * steps + [1.0]
    early = max(1 - epoch / epochs, 0.03) / steps
    return [0.0, *[early] * (steps - 1), 1 - early * (steps - 1)]


ALGORITHM = Algorithm(meta_gradient, capturable=True, loops=True, measured_as="exact")
