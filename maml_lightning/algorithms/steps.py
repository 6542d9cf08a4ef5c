"""One inner step, and the inner loop that repeats it, as pure functions of one task.

For a task with support loss ``L_s`` and adapted parameters ``theta`` (Finn, Abbeel and Levine 2017, algorithm 1)::

    theta_{k+1} = theta_k - alpha_k * grad L_s(theta_k)       k = 0 .. S-1

Momentum and Adam carry their state beside the parameters. The proximal term of iMAML adds ``mu (theta_k - theta_0)`` to
the gradient. Parameters that are not adapted, and those with one value for each ``theta_k`` (MAML++), are shared by all
tasks.

Everything is differentiated inside ``vmap``: outside of it, normalization layers have a silently wrong second
derivative (functorch #534).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.optimizers import InnerOptimizer, Parameters
from maml_lightning.engine.chunks import detached
from maml_lightning.engine.kernels.layout import kernel_layout
from maml_lightning.engine.kernels.mode import TaskKernels
from maml_lightning.engine.kernels.normalization import OfSupport
from maml_lightning.engine.memory import FlatMemory, keep_freed_memory
from maml_lightning.engine.tracing import State, Tracer
from maml_lightning.episodes import Episode
from maml_lightning.task_statistics import statistics_of_first

Loss = Callable[[Tensor, Tensor], Tensor]


class Model(NamedTuple):
    """The Python objects that the functions of one task depend on; their first argument.

    Args:
        net: the network, run through ``functional_call``.
        loss: ``loss(outputs, targets)``, a scalar.
        optimizer: of the inner loop.
        proximal: strength ``mu`` of the proximal term, 0 for none.
        of_support: whether queries are normalized with the statistics of the support set.
    """

    net: nn.Module
    loss: Loss
    optimizer: InnerOptimizer
    proximal: float
    of_support: bool = False


def outputs(model: Model, fast: Parameters, shared: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
    """The network's outputs with adapted parameters ``fast`` and those that all tasks share."""
    with TaskKernels():
        return functional_call(model.net, {**fast, **shared, **buffers}, (x,))


def query_outputs(
    model: Model, fast: Parameters, shared: Parameters, buffers: Parameters, x: Tensor, support: Any
) -> Tensor:
    """The outputs on queries ``x``, which run together with the ``support`` inputs where their statistics count."""
    if not model.of_support:
        return outputs(model, fast, shared, buffers, x)
    both = pytree.tree_map(lambda *parts: torch.cat(parts), support, x)
    first, examples = (len(pytree.tree_leaves(part)[0]) for part in (support, both))
    with statistics_of_first(first, examples), OfSupport():
        predictions = outputs(model, fast, shared, buffers, both)
    return pytree.tree_map(lambda part: part[first:], predictions)


def support_gradient(
    model: Model, params: tuple[Parameters, Parameters], buffers: Parameters, x: Tensor, y: Tensor
) -> Parameters:
    """``grad L_s`` with respect to the first of ``(adapted, shared)`` parameters."""
    fast, shared = params
    return grad(lambda fast: model.loss(outputs(model, fast, shared, buffers, x), y))(fast)


def step(
    model: Model, differentiable: tuple, fixed: dict[str, Parameters], buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[Parameters, Any]:
    """``theta_{k+1}`` and the optimizer's state after it.

    Args:
        model: network, loss and optimizer.
        differentiable: ``((theta_k, state), arguments)``: what the step is differentiated with respect to.
        fixed: arguments that it is not differentiated with respect to. Together they are ``shared`` parameters,
            ``rates`` and, with a proximal term, the ``initial`` parameters.
        buffers: of the network.
        x: support inputs ``[N*K, ...]``.
        y: support targets ``[N*K]``.
    """
    (fast, state), arguments = differentiable[0], {**fixed, **differentiable[1]}
    gradient = support_gradient(model, (fast, arguments["shared"]), buffers, x, y)
    return _update(model, gradient, state, fast, arguments)


def first_order_step(
    model: Model, differentiable: tuple, fixed: dict[str, Parameters], buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[Parameters, Any]:
    """The same step, whose derivative lacks the Hessian: the support gradient counts as a constant."""
    (fast, state), arguments = differentiable[0], {**fixed, **differentiable[1]}
    constants = pytree.tree_map(torch.detach, (fast, arguments["shared"]))
    return _update(model, support_gradient(model, constants, buffers, x, y), state, fast, arguments)


def _update(
    model: Model, gradient: Parameters, state: Any, fast: Parameters, arguments: dict[str, Parameters]
) -> tuple[Parameters, Any]:
    if model.proximal:
        initial = arguments["initial"]
        gradient = {name: g + model.proximal * (fast[name] - initial[name]) for name, g in gradient.items()}
    return model.optimizer.update(gradient, state, fast, arguments["rates"])


def _query_gradient(
    model: Model, fast: Parameters, shared: Parameters, buffers: Parameters, x: Tensor, y: Tensor, support: Any
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    def objective(params: tuple[Parameters, Parameters]) -> tuple[Tensor, Tensor]:
        predictions = query_outputs(model, *params, buffers, x, support)
        return model.loss(predictions, y), predictions

    gradient, (value, predictions) = grad_and_value(objective, has_aux=True)((fast, shared))
    return gradient, value, predictions


class Setup(NamedTuple):
    """What the tasks of a meta-batch are adapted with.

    Args:
        tracer: runs the functions of one task over all tasks of a chunk.
        flat_memory: whether the backward pass recomputes the inner steps.
        model: network, loss and optimizer, as they are now.
        buffers: of the network.
        initial: ``theta_0`` of the adapted parameters.
        shared: the other parameters at ``theta_0 … theta_S``.
        rates: the inner learning rates of each step.
        learned_rates: whether a rate requires a gradient.
        labels: of the classes ``[N]`` where the last layer starts from their prototypes, else None.
        state: where ``initial`` is each task's own, ``[T, ...]``, the optimizer's state that goes with it.
    """

    tracer: Tracer
    flat_memory: FlatMemory
    model: State
    buffers: Parameters
    initial: Parameters
    shared: list[Parameters]
    rates: list[Parameters]
    learned_rates: bool
    labels: Tensor | None = None
    state: Any = None

    @property
    def steps(self) -> int:
        """Inner steps ``S``."""
        return len(self.rates)

    def task_dim(self, step: int) -> int | None:
        """The dimension over tasks of ``theta_k``: none at ``k = 0`` where all tasks share it."""
        return None if step == 0 and self.state is None else 0

    def beside_queries(self, chunk: Episode) -> Any:
        """The inputs that queries are evaluated with: those of the support set, or none."""
        return chunk.support_inputs if self.model.objects.of_support else ()

    def arguments(self) -> list[dict[str, Parameters]]:
        """What each step takes beside ``theta_k`` and the optimizer's state."""
        initial = {"initial": self.initial} if self.model.objects.proximal else {}
        pairs = zip(self.shared, self.rates, strict=False)
        return [{"shared": shared, "rates": rates, **initial} for shared, rates in pairs]

    def initial_state(self) -> tuple[Parameters, Any]:
        """``theta_0`` and the optimizer's state before the first step."""
        state = self.model.objects.optimizer.init(self.initial) if self.state is None else self.state
        return self.initial, state


def prepare(
    model: Model,
    tracer: Tracer,
    flat_memory: FlatMemory,
    params: Parameters,
    rates: float | Parameters,
    steps: int,
) -> Setup:
    """Sort the parameters into adapted and shared ones, and lay out both for the kernels.

    Args:
        model: network, loss and optimizer.
        tracer: runs the functions of one task over all tasks of a chunk.
        flat_memory: whether the backward pass recomputes the inner steps.
        params: by name, shaped like the network's or ``[S+1, ...]``, one value for each ``theta_k``; those are shared.
        rates: a number, or ``[1 or S, ...]`` by name of the adapted parameters.
        steps: inner steps ``S``, at least 0.
    """
    keep_freed_memory()
    values = {name: detached(value) for name, value in params.items()}
    dims = {name: value.dim() for name, value in model.net.named_parameters()}
    per_step = {name: value for name, value in values.items() if value.dim() > dims[name]}
    if not isinstance(rates, dict):
        rate = next(iter(values.values())).new_tensor([rates])
        rates = {name: rate for name in values if name not in per_step}
    shared = {name: kernel_layout(v) for name, v in values.items() if name not in rates and name not in per_step}
    detached_rates = {name: detached(rate) for name, rate in rates.items()}
    return Setup(
        tracer,
        flat_memory,
        tracer.state(model),
        {name: buffer.detach() for name, buffer in model.net.named_buffers()},
        {name: kernel_layout(value) for name, value in values.items() if name in rates},
        [{**shared, **_of_step(per_step, k)} for k in range(steps + 1)],
        [_of_step(detached_rates, k) for k in range(steps)],
        any(rate.requires_grad for rate in rates.values()),
    )


def descend(setup: Setup, inputs: Tensor, targets: Tensor) -> Iterator[Parameters]:
    """The fast weights ``theta_0 … theta_S`` one by one, without what a gradient needs.

    Args:
        setup: parameters and rates.
        inputs: ``[T, N*K, ...]``.
        targets: ``[T, N*K]``.
    """
    state, traced_step = setup.initial_state(), setup.model.bind(step)
    yield setup.initial
    for k, arguments in enumerate(setup.arguments()):
        in_dims = ((setup.task_dim(k), None), None, None, 0, 0)
        state = setup.tracer(traced_step, in_dims, (state, {}), arguments, setup.buffers, inputs, targets)
        yield state[0]


def adapt(setup: Setup, inputs: Tensor, targets: Tensor) -> Parameters:
    """The fast weights ``theta_S``, ``[T, ...]`` by name; the earlier ones are freed at once."""
    for fast in descend(setup, inputs, targets):  # noqa: B007
        pass
    return fast


def predict(setup: Setup, fast: Parameters, step: int, chunk: Episode) -> Tensor:
    """The outputs ``[T, N*Q, ...]`` on the query inputs of networks with the fast weights of a step."""
    arguments = (fast, setup.shared[step], setup.buffers, chunk.query_inputs, setup.beside_queries(chunk))
    return setup.tracer(setup.model.bind(query_outputs), (setup.task_dim(step), None, None, 0, 0), *arguments)


def query_gradient(
    setup: Setup, fast: Parameters, step: int, chunk: Episode
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    """The gradient of the query loss at the fast weights of a step, task by task.

    Returns:
        ``(gradient to adapted, gradient to shared parameters)``, ``[T, ...]`` by name; the losses ``[T]``; the
        predictions ``[T, N*Q, ...]``.
    """
    queries = (chunk.query_inputs, chunk.query_targets, setup.beside_queries(chunk))
    arguments = (fast, setup.shared[step], setup.buffers, *queries)
    return setup.tracer(setup.model.bind(_query_gradient), (setup.task_dim(step), None, None, 0, 0, 0), *arguments)


def _of_step(values: Parameters, step: int) -> Parameters:
    return {name: kernel_layout(value[min(step, len(value) - 1)]) for name, value in values.items()}
