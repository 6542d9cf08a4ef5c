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
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from maml_lightning.algorithms.optimizers import InnerOptimizer, Parameters
from maml_lightning.engine.chunks import detached
from maml_lightning.engine.differentiation import grad, grad_and_value, is_by_autograd
from maml_lightning.engine.execution import Executor
from maml_lightning.engine.kernels.layout import kernel_layout
from maml_lightning.engine.kernels.mode import loop_operators, task_operators
from maml_lightning.engine.memory import FlatMemory, keep_freed_memory
from maml_lightning.engine.state import State
from maml_lightning.episodes import Episode

Loss = Callable[[Tensor, Tensor], Tensor]


class Model(NamedTuple):
    """The Python objects that the functions of one task depend on; their first argument.

    Args:
        net: the network, run through ``functional_call``.
        loss: ``loss(outputs, targets)``, a scalar.
        optimizer: of the inner loop.
        proximal: strength ``mu`` of the proximal term, 0 for none.
    """

    net: nn.Module
    loss: Loss
    optimizer: InnerOptimizer
    proximal: float


def outputs(model: Model, fast: Parameters, shared: Parameters, buffers: Parameters, x: Tensor) -> Tensor:
    """The network's outputs with adapted parameters ``fast`` and those that all tasks share."""
    values = {**fast, **shared}
    if is_by_autograd():  # in a loop over tasks the network keeps its own buffers, and may write to them
        with loop_operators():
            return _call(model.net, values, x)
    with task_operators():
        return _call(model.net, {**values, **buffers}, x)


def _call(net: nn.Module, tensors: Parameters, x: Tensor) -> Tensor:
    own = {path: tensors[name] for path, name in tensor_paths(net).items() if name in tensors}
    with _uncompiled(net):
        return functional_call(net, own, (x,), tie_weights=False)


@contextmanager
def _uncompiled(net: nn.Module) -> Iterator[None]:
    """Run what ``torch.compile`` made of a network, which has no second derivatives, as it was."""
    if not any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl for layer in net.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


def tensor_paths(net: nn.Module) -> dict[str, str]:
    """Where each parameter and buffer is kept, and the name by which it is given.

    A tensor that several layers share has one name, the first, and several paths. A layer that is registered twice
    has one path: ``functional_call`` would swap its tensors twice, and not back (``tie_weights`` does).
    """
    paths, names = {}, {}
    for prefix, layer in net.named_modules():
        for local, value in (*layer._parameters.items(), *layer._buffers.items()):
            if value is not None:
                path = f"{prefix}.{local}".lstrip(".")
                paths[path] = names.setdefault(id(value), path)
    return paths


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
    model: Model, fast: Parameters, shared: Parameters, buffers: Parameters, x: Tensor, y: Tensor
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    def objective(params: tuple[Parameters, Parameters]) -> tuple[Tensor, Tensor]:
        predictions = outputs(model, *params, buffers, x)
        return model.loss(predictions, y), predictions

    gradient, (value, predictions) = grad_and_value(objective)((fast, shared))
    return gradient, value, predictions


class Setup(NamedTuple):
    """What the tasks of a meta-batch are adapted with.

    Args:
        executor: runs the functions of one task over all tasks of a chunk.
        flat_memory: whether the backward pass recomputes the inner steps.
        model: network, loss and optimizer, as they are now.
        buffers: of the network.
        initial: ``theta_0`` of the adapted parameters.
        shared: the other parameters at ``theta_0 … theta_S``.
        rates: the inner learning rates of each step.
        learned_rates: whether a rate requires a gradient.
    """

    executor: Executor
    flat_memory: FlatMemory
    model: State
    buffers: Parameters
    initial: Parameters
    shared: list[Parameters]
    rates: list[Parameters]
    learned_rates: bool

    @property
    def steps(self) -> int:
        """Inner steps ``S``."""
        return len(self.rates)

    def arguments(self) -> list[dict[str, Parameters]]:
        """What each step takes beside ``theta_k`` and the optimizer's state."""
        initial = {"initial": self.initial} if self.model.objects.proximal else {}
        pairs = zip(self.shared, self.rates, strict=False)
        return [{"shared": shared, "rates": rates, **initial} for shared, rates in pairs]

    def initial_state(self) -> tuple[Parameters, Any]:
        """``theta_0`` and the optimizer's state before the first step."""
        return self.initial, self.model.objects.optimizer.init(self.initial)


def prepare(
    model: Model,
    executor: Executor,
    flat_memory: FlatMemory,
    params: Parameters,
    rates: float | Parameters,
    steps: int,
) -> Setup:
    """Sort the parameters into adapted and shared ones, and lay out both for the kernels.

    Args:
        model: network, loss and optimizer.
        executor: runs the functions of one task over all tasks of a chunk.
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
        executor,
        flat_memory,
        executor.state(model),
        {name: buffer.detach() for name, buffer in model.net.named_buffers()},
        {name: kernel_layout(value) for name, value in values.items() if name in rates},
        [{**shared, **_of_step(per_step, k)} for k in range(steps + 1)],
        [_of_step(detached_rates, k) for k in range(steps)],
        any(rate.requires_grad for rate in rates.values()),
    )


def task_dim(step: int) -> int | None:
    """The dimension over tasks of ``theta_k``: none at ``k = 0``, which all tasks share."""
    return 0 if step else None


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
        in_dims = ((task_dim(k), None), None, None, 0, 0)
        state = setup.executor(traced_step, in_dims, (state, {}), arguments, setup.buffers, inputs, targets)
        yield state[0]


def adapt(setup: Setup, inputs: Tensor, targets: Tensor) -> Parameters:
    """The fast weights ``theta_S``, ``[T, ...]`` by name; the earlier ones are freed at once."""
    for fast in descend(setup, inputs, targets):  # noqa: B007
        pass
    return fast


def predict(setup: Setup, fast: Parameters, step: int, inputs: Tensor) -> Tensor:
    """The outputs ``[T, N*Q, ...]`` of networks with the fast weights of a step."""
    arguments = (fast, setup.shared[step], setup.buffers, inputs)
    return setup.executor(setup.model.bind(outputs), (task_dim(step), None, None, 0), *arguments)


def query_gradient(
    setup: Setup, fast: Parameters, step: int, chunk: Episode
) -> tuple[tuple[Parameters, Parameters], Tensor, Tensor]:
    """The gradient of the query loss at the fast weights of a step, task by task.

    Returns:
        ``(gradient to adapted, gradient to shared parameters)``, ``[T, ...]`` by name; the losses ``[T]``; the
        predictions ``[T, N*Q, ...]``.
    """
    arguments = (fast, setup.shared[step], setup.buffers, chunk.query_inputs, chunk.query_targets)
    return setup.executor(setup.model.bind(_query_gradient), (task_dim(step), None, None, 0, 0), *arguments)


def _of_step(values: Parameters, step: int) -> Parameters:
    return {name: kernel_layout(value[min(step, len(value) - 1)]) for name, value in values.items()}
