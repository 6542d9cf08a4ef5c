"""ProtoMAML: the head starts from the support classes' mean features (Triantafillou et al. 2020, section 3).

A prototypical network classifies by the squared distance to each class's mean feature ``c_k``. As
``-|f - c_k|^2 = 2 c_k f - |c_k|^2 - |f|^2`` and the last term is the same for all classes, that is a linear layer with
``W_k = 2 c_k`` and ``b_k = -|c_k|^2``. It is where a task's last layer starts; then it is adapted like all else. The
gradient goes through the prototypes, with first_order as well: that drops second derivatives of the inner steps alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maml_lightning.algorithms.model import Model, outputs
from maml_lightning.algorithms.optimizers import Parameters
from maml_lightning.algorithms.steps import Setup
from maml_lightning.devices import has_values
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import call, tensor_of

_NO_EXAMPLES = -1e9  # the bias of a class of which the support set has none; small enough to be added up in any type


class _LinearCalls(TorchFunctionMode):
    """While active, notes the last linear layer of a network that ran and its inputs, ``("", None)`` of no layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
        self.last: tuple[str, Tensor | None] = ("", None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            given = {**dict(zip(("input", "weight"), args, strict=False)), **(kwargs or {})}
            weights = ((name, layer._parameters.get("weight")) for name, layer in self.layers.items())
            found = [name for name, weight in weights if weight is given["weight"]]
            self.last = (found[0], given["input"]) if found else ("", None)
        return func(*args, **(kwargs or {}))


def labels_of(support_targets: Any, query_targets: Any = None) -> Tensor:
    """The labels ``0 ... N-1`` of the classes in support targets.

    Raises:
        SettingError: there are none, or the targets are no classes, or a query's class is not among them.
    """
    if (kind := _kind(support_targets)) != "classes":
        raise SettingError(
            f"model.head prototypes needs support targets that are classes (got {kind}); set it to learned."
        )
    if not has_values(support_targets):  # at most as many as examples
        return torch.arange(support_targets.shape[-1], device=support_targets.device)
    both = [support_targets] if query_targets is None else [support_targets, query_targets]
    last, *of_query = torch.stack([targets.max() for targets in both]).tolist()  # a GPU is waited for once
    classes = last + 1
    if of_query and of_query[0] >= classes:
        raise SettingError(
            f"model.head prototypes needs support examples of each query's class (got a query of class "
            f"{of_query[0]}, but {classes} classes in the support set); set it to learned."
        )
    return torch.arange(classes, device=support_targets.device)


def _kind(targets: Any) -> str:
    if not isinstance(targets, Tensor):
        return type(targets).__name__
    return "floats" if targets.is_floating_point() else "classes" if targets.numel() else "none"


def logits_and_norms(net: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """The logits ``[n, N]`` of an adapted network, and the squared norms ``[n]`` of the features its last layer gets.

    Their difference is minus the squared distance to each prototype.

    Args:
        net: an adapted copy of a network with a head of prototypes.
        inputs: ``[n, ...]``.
    """
    with _LinearCalls(net) as calls:
        logits = tensor_of(call(net, inputs))
    features = calls.last[1]
    assert features is not None  # of a head of prototypes
    return logits, features.square().sum(-1)


def of_task(setup: Setup, inputs: Any, targets: Any) -> Setup:
    """The setup of one task ``[N*K, ...]``, whose last layer starts from its prototypes if there are labels."""
    if setup.labels is None:
        return setup
    params = (setup.initial, setup.shared[0])
    fast, state = setup.model.bind(_start)(params, setup.constants, inputs, targets, setup.labels)
    return setup._replace(initial=fast, state=state)


def of_tasks(setup: Setup, chunk: Episode) -> Setup:
    """The setup of a chunk, in which each task has a ``theta_0`` of its own, ``[T, ...]``, if there are labels."""
    return setup if setup.labels is None else _of_tasks(setup.executor, setup, chunk)


def tried_of_tasks(setup: Setup, chunk: Episode) -> Setup:
    """The same as :func:`of_tasks`, of copies of the network, so that nothing has happened to it."""
    return setup if setup.labels is None else _of_tasks(setup.executor.tried, setup, chunk)


def with_pullback(setup: Setup, chunk: Episode) -> tuple[Setup, Callable[[Any], tuple[Parameters, Parameters]]]:
    """The same, with the pullback of ``theta_0`` and the optimizer's state to the (adapted, shared) parameters."""
    if setup.labels is None:
        return setup, lambda adjoint: (adjoint[0], {})
    pullbacks: list[Callable[[Any], Any]] = []

    def run(*args: Any) -> Any:
        start, pullback = setup.executor.vjp(*args, recompute=setup.flat_memory.active)
        pullbacks.append(pullback)
        return start

    return _of_tasks(run, setup, chunk), pullbacks[0]


def _of_tasks(run: Callable[..., Any], setup: Setup, chunk: Episode) -> Setup:
    support = (chunk.support_inputs, chunk.support_targets)
    arguments = ((setup.initial, setup.shared[0]), setup.constants, *support, setup.labels)
    start = run(setup.model.bind(_start), ((None, None), None, 0, 0, None), *arguments)
    return setup if start is None else setup._replace(initial=start[0], state=start[1])


def _start(
    model: Model, params: tuple[Parameters, Parameters], constants: Parameters, x: Any, y: Tensor, labels: Tensor
) -> tuple[Parameters, Any]:
    """``theta_0`` of one task, with the prototypes of its classes as last layer, and the optimizer's state."""
    with _LinearCalls(model.net) as calls:
        outputs(model, *params, constants, x)
    fast = _with_prototypes(params[0], calls, y, labels)
    return fast, model.optimizer.init(fast)


def _with_prototypes(fast: Parameters, calls: _LinearCalls, targets: Tensor, labels: Tensor) -> Parameters:
    """The parameters of one task, with the prototypes in place of those of the last linear layer.

    Args:
        fast: the adapted parameters by name; the network has just run on the support inputs with them.
        calls: what was noted then.
        targets: of the support set, ``[N*K]``.
        labels: ``0 ... N-1``.

    Raises:
        SettingError: the network does not end in a linear layer that is adapted and has a bias.
    """
    layer, features = calls.last
    weight, bias = (f"{layer}.{name}".lstrip(".") for name in ("weight", "bias"))
    if features is None or {weight, bias} - fast.keys() or features.shape[:-1] != targets.shape:
        raise SettingError(
            "model.head prototypes needs a network whose last layer to run is an nn.Linear with a bias, on one vector "
            "of features for each example, not frozen and among model.adapted_parameters; use model.head learned."
        )
    of_class = (targets[:, None] == labels).to(fast[weight].dtype)
    count = of_class.sum(0)
    means = of_class.T @ features.to(of_class.dtype) / count.clamp(min=1)[:, None]
    absent = max(_NO_EXAMPLES, torch.finfo(of_class.dtype).min / 2)
    # Each a tensor of its own: inner gradients hold the prototypes constant, which depend on the same parameters.
    fast = {name: value.view_as(value) for name, value in fast.items()}
    return {**fast, weight: 2 * means, bias: torch.where(count > 0, -means.square().sum(1), absent)}
