"""One inner step, and the inner loop that repeats it, as pure functions of one task.

For a task with support loss ``L_s`` and adapted parameters ``theta`` (Finn, Abbeel and Levine 2017, algorithm 1)::

    theta_{k+1} = theta_k - alpha_k * grad L_s(theta_k)       k = 0 .. S-1

Momentum and Adam carry their state beside the parameters. The proximal term of iMAML adds ``mu (theta_k - theta_0)`` to
the gradient. Parameters that are not adapted, and those with one value for each ``theta_k`` (MAML++), are shared by all
tasks.

Everything is differentiated inside ``vmap``: outside of it, normalization layers have a silently wrong second
derivative (functorch #534).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.curvature import transformed
from maml_lightning.algorithms.model import Model, outputs, query_loss, query_outputs, returned
from maml_lightning.algorithms.optimizers import Parameters, rates_of
from maml_lightning.engine.chunks import detached
from maml_lightning.engine.differentiation import grad, grad_and_value, is_by_autograd
from maml_lightning.engine.execution import Executor
from maml_lightning.engine.kernels.layout import kernel_layout, repeated
from maml_lightning.engine.memory import FlatMemory, keep_freed_memory
from maml_lightning.engine.state import State
from maml_lightning.episodes import Episode
from maml_lightning.structures import examples_of


def support_gradient(
    model: Model, params: tuple[Parameters, Parameters], constants: Parameters, x: Any, y: Any
) -> Parameters:
    """``grad L_s`` with respect to the first of ``(adapted, shared)`` parameters."""
    fast, shared = params
    return grad(lambda fast: model.loss_of(returned(model, fast, shared, constants, x), y))(fast)


def step(
    model: Model, differentiable: tuple, fixed: dict[str, Parameters], constants: Parameters, x: Any, y: Any
) -> tuple[Parameters, Any]:
    """``theta_{k+1}`` and the optimizer's state after it.

    Args:
        model: network, loss and optimizer.
        differentiable: ``((theta_k, state), arguments)``: what the step is differentiated with respect to.
        fixed: arguments that it is not differentiated with respect to. Together they are ``shared`` parameters,
            ``rates``, ``learned`` rates and, with a proximal term, the ``initial`` parameters.
        constants: buffers and frozen parameters, by name.
        x: support inputs ``[N*K, ...]``.
        y: support targets ``[N*K]``.
    """
    (fast, state), arguments = differentiable[0], {**fixed, **differentiable[1]}
    gradient = support_gradient(model, (fast, arguments["shared"]), constants, x, y)
    return _update(model, gradient, state, fast, arguments)


def first_order_step(
    model: Model, differentiable: tuple, fixed: dict[str, Parameters], constants: Parameters, x: Any, y: Any
) -> tuple[Parameters, Any]:
    """The same step, whose derivative lacks the Hessian: the support gradient counts as a constant."""
    (fast, state), arguments = differentiable[0], {**fixed, **differentiable[1]}
    detached_params = pytree.tree_map(torch.detach, (fast, arguments["shared"]))
    with torch.no_grad() if is_by_autograd() else nullcontext():  # autograd keeps no graph of the gradient
        gradient = support_gradient(model, detached_params, constants, x, y)
    return _update(model, gradient, state, fast, arguments)


def _update(
    model: Model, gradient: Parameters, state: Any, fast: Parameters, arguments: dict[str, Parameters]
) -> tuple[Parameters, Any]:
    if model.proximal:
        initial = arguments["initial"]
        gradient = {name: g + model.proximal * (fast[name] - initial[name]) for name, g in gradient.items()}
    rates = {**arguments["rates"], **arguments["learned"]}
    return model.optimizer.update(transformed(gradient, rates), state, fast, rates)


def _query_gradient(
    model: Model, fast: Parameters, shared: Parameters, constants: Parameters, x: Any, y: Any, support: Any
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    def objective(params: tuple[Parameters, Parameters]) -> tuple[Tensor, Tensor]:
        return query_loss(model, *params, constants, x, y, support)

    gradient, (value, predictions) = grad_and_value(objective)((fast, shared))
    return gradient, value, predictions


class Setup(NamedTuple):
    """What the tasks of a meta-batch are adapted with.

    Args:
        executor: runs the functions of one task over all tasks of a chunk.
        flat_memory: whether the backward pass recomputes the inner steps.
        model: network, loss and optimizer, as they are now.
        constants: buffers and frozen parameters, by name.
        initial: ``theta_0`` of the adapted parameters.
        shared: the other parameters at ``theta_0 … theta_S``.
        rates: the inner learning rates of each step, but for
        learned: those that require a gradient, and the curvature matrices.
        labels: of the classes ``[N]`` where the last layer starts from their prototypes, else None.
        state: where ``initial`` is each task's own, ``[T, ...]``, the optimizer's state that goes with it.
    """

    executor: Executor
    flat_memory: FlatMemory
    model: State
    constants: Parameters
    initial: Parameters
    shared: list[Parameters]
    rates: list[Parameters]
    learned: list[Parameters]
    labels: Tensor | None = None
    state: Any = None

    @property
    def steps(self) -> int:
        """Inner steps ``S``."""
        return len(self.rates)

    def task_dim(self, step: int) -> int | None:
        """The dimension over tasks of ``theta_k``: none where all tasks share it."""
        return None if step == 0 and self.state is None and self.steps < 2 else 0

    def beside_queries(self, chunk: Episode) -> Any:
        """The inputs that queries are evaluated with: those of the support set, or none."""
        return chunk.support_inputs if self.model.objects.of_support else ()

    def arguments(self) -> list[dict[str, Parameters]]:
        """What each step takes beside ``theta_k`` and the optimizer's state."""
        initial = {"initial": self.initial} if self.model.objects.proximal else {}
        parts = zip(self.shared, self.rates, self.learned, strict=False)
        return [{"shared": shared, "rates": rates, "learned": learned, **initial} for shared, rates, learned in parts]

    def initial_state(self) -> tuple[Parameters, Any]:
        """``theta_0`` and the optimizer's state before the first step."""
        state = self.model.objects.optimizer.init(self.initial) if self.state is None else self.state
        return self.initial, state

    def start(self, tasks: int) -> tuple[Parameters, Any]:
        """The same for a chunk of tasks, with the dimension over tasks that :meth:`task_dim` says.

        Each task has a copy where more than one step follows: then all steps are one function, traced once.
        """
        start = self.initial_state()
        if self.state is not None or self.task_dim(0) is None:
            return start
        return pytree.tree_map(lambda value: repeated(value, tasks), start)


def prepare(
    model: State,
    executor: Executor,
    flat_memory: FlatMemory,
    params: Parameters,
    buffers: Parameters,
    rates: float | Parameters,
    steps: int,
) -> Setup:
    """Sort the parameters into adapted and shared ones, and lay out both for the kernels.

    Args:
        model: network, loss and optimizer, as they are now.
        executor: runs the functions of one task over all tasks of a chunk.
        flat_memory: whether the backward pass recomputes the inner steps.
        params: by name, shaped like the network's or ``[S+1, ...]``, one value for each ``theta_k``; those are shared.
            Where some require a gradient, the others are frozen: they have none.
        buffers: the network's, by name.
        rates: a number, or ``[1 or S, ...]`` by name of the adapted parameters; with them the curvature matrices.
        steps: inner steps ``S``, at least 0.
    """
    keep_freed_memory()
    values = {name: detached(value) for name, value in params.items()}
    dims = {name: value.dim() for name, value in model.objects.net.named_parameters()}
    per_step = {name: value for name, value in values.items() if value.dim() > dims[name]}
    if not isinstance(rates, dict):
        rates = rates_of({name: value for name, value in values.items() if name not in per_step}, rates)
    trained = {name for name, value in params.items() if value.requires_grad} or set(params)
    # Copies: a layer may write to its parameters (``max_norm`` of an embedding).
    values = {name: value.clone() if name in trained else value for name, value in values.items()}
    rest = {name: kernel_layout(v) for name, v in values.items() if name not in rates and name not in per_step}
    shared = {name: value for name, value in rest.items() if name in trained}
    frozen = {name: value for name, value in rest.items() if name not in trained}
    learned = {name: detached(rate) for name, rate in rates.items() if rate.requires_grad}
    fixed = {name: detached(rate) for name, rate in rates.items() if name not in learned}
    return Setup(
        executor,
        flat_memory,
        model,
        {**{name: buffer.detach() for name, buffer in buffers.items()}, **frozen},
        {name: kernel_layout(value) for name, value in values.items() if name in rates},
        [{**shared, **_of_step(per_step, k)} for k in range(steps + 1)],
        [_of_step(fixed, k) for k in range(steps)],
        [_of_step(learned, k) for k in range(steps)],
    )


def bytes_per_task(setup: Setup, episode: Episode) -> int:
    """About how many bytes a task of the episode keeps for the backward pass, from a run of its support set.

    Args:
        setup: parameters and rates.
        episode: ``T`` tasks, of which the first is run.
    """
    model, first, start = setup.model, setup.task_dim(0), setup.start(episode.tasks)
    shared = (setup.constants, episode.support_inputs)
    kept = setup.executor.saved_bytes(model.bind(outputs), (first, None, None, 0), start[0], setup.shared[-1], *shared)
    examples, queries = examples_of(episode.support_inputs), examples_of(episode.query_inputs)
    kept = kept * (queries + examples * model.objects.of_support) // max(examples, 1)
    for arguments in setup.arguments()[:1]:
        support: tuple = ((start, {}), arguments, *shared, episode.support_targets)
        count = 1 if setup.flat_memory.active else setup.steps
        kept += count * setup.executor.saved_bytes(model.bind(step), ((first, None), None, None, 0, 0), *support)
    return kept


def descend(setup: Setup, inputs: Any, targets: Any) -> Iterator[Parameters]:
    """The fast weights ``theta_0 … theta_S`` one by one, without what a gradient needs.

    Args:
        setup: parameters and rates.
        inputs: ``[T, N*K, ...]``.
        targets: ``[T, N*K]``.
    """
    state, traced_step = setup.start(len(pytree.tree_leaves(inputs)[0])), setup.model.bind(step)
    yield state[0]
    for k, arguments in enumerate(setup.arguments()):
        in_dims = ((setup.task_dim(k), None), None, None, 0, 0)
        state = setup.executor(traced_step, in_dims, (state, {}), arguments, setup.constants, inputs, targets)
        yield state[0]


def adapt(setup: Setup, inputs: Any, targets: Any) -> Parameters:
    """The fast weights ``theta_S``, ``[T, ...]`` by name; the earlier ones are freed at once."""
    for fast in descend(setup, inputs, targets):  # noqa: B007
        pass
    return fast


def predict(setup: Setup, fast: Parameters, step: int, chunk: Episode) -> Tensor:
    """The outputs ``[T, N*Q, ...]`` on the query inputs of networks with the fast weights of a step."""
    arguments = (fast, setup.shared[step], setup.constants, chunk.query_inputs, setup.beside_queries(chunk))
    return setup.executor(setup.model.bind(query_outputs), (setup.task_dim(step), None, None, 0, 0), *arguments)


def evaluate(setup: Setup, fast: Parameters, step: int, chunk: Episode) -> tuple[Tensor, Tensor]:
    """The query losses ``[T]`` and the outputs of :func:`predict`."""
    arguments = (fast, setup.shared[step], setup.constants, *_queries(setup, chunk))
    return setup.executor(setup.model.bind(query_loss), (setup.task_dim(step), None, None, 0, 0, 0), *arguments)


def query_gradient(
    setup: Setup, fast: Parameters, step: int, chunk: Episode
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    """The gradient of the query loss at the fast weights of a step, task by task.

    Returns:
        ``(gradient to adapted, gradient to shared parameters)``, ``[T, ...]`` by name; the losses ``[T]``; the
        predictions ``[T, N*Q, ...]``.
    """
    arguments = (fast, setup.shared[step], setup.constants, *_queries(setup, chunk))
    return setup.executor(setup.model.bind(_query_gradient), (setup.task_dim(step), None, None, 0, 0, 0), *arguments)


def _queries(setup: Setup, chunk: Episode) -> tuple[Any, Any, Any]:
    return chunk.query_inputs, chunk.query_targets, setup.beside_queries(chunk)


def _of_step(values: Parameters, step: int) -> Parameters:
    return {name: kernel_layout(value[min(step, len(value) - 1)]) for name, value in values.items()}
