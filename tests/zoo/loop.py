"""The judge: MAML as a plain loop over tasks with ``torch.autograd.grad``, nothing of the package's.

Parameters are put into the network by hand, in every place where they are registered: ``functional_call`` does not
restore a module that is registered twice.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Parameters = dict[str, Tensor]
Loss = Callable[[Any, Any], Tensor]


class Result(NamedTuple):
    """What the loop computed: the mean loss, its gradient, and each task's query outputs after each step."""

    loss: float
    gradient: Parameters
    outputs: list[list[Tensor]]  # by task and step


class _TwiceDifferentiable(TorchFunctionMode):
    """Replaces operators whose second derivative PyTorch lacks, or has wrong, by others with the same values."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if function is F.embedding_bag:
            return _bag(*args, **(kwargs or {}))
        if function is torch._weight_norm:  # that of a kernel of dimension 0
            v, g, _ = args
            return g * v / v.square().sum(list(range(1, v.dim())), keepdim=True).sqrt()
        return function(*args, **(kwargs or {}))


def _bag(tokens: Tensor, weight: Tensor, offsets: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    mode = next((value for value in (*rest, *options.values()) if value in ("sum", "mean", "max")), "mean")
    bags = tokens if offsets is None else torch.tensor_split(tokens, offsets[1:])
    rows = [F.embedding(bag, weight) for bag in bags]
    return torch.stack([row.max(0).values if mode == "max" else getattr(row, mode)(0) for row in rows])


class Swapped:
    """A network that is called with other parameters.

    Args:
        net: the network; its buffers change as in any call.
        buffers: ``call``: each call begins with the buffers that the network has now; ``task``: the loop puts them
            back with :meth:`restore`; ``kept``: nobody does.
    """

    def __init__(self, net: nn.Module, buffers: str = "call") -> None:
        self.net, self.buffers = net, buffers
        self.replaces = any(isinstance(layer, nn.Hardsigmoid | nn.EmbeddingBag) for layer in net.modules())
        self.replaces |= any("WeightNorm" in repr(vars(layer)) for layer in net.modules())
        self.names = {id(value): name for name, value in net.named_parameters()}
        self.places = [
            (self.names[id(value)], layer, name)
            for layer in net.modules()
            for name, value in layer._parameters.items()
            if value is not None
        ]
        self.values = dict(net.named_parameters())
        self.kept = [
            (layer, name, value, None if value is None else value.clone())
            for layer in net.modules()
            for name, value in layer._buffers.items()
        ]

    def restore(self) -> None:
        for layer, name, tensor, value in self.kept:
            if tensor is not None:
                tensor.data = value.clone()
            layer._buffers[name] = tensor

    def _put(self, values: Parameters) -> None:
        for name, layer, attribute in self.places:
            layer._parameters[attribute] = values[name]
            if isinstance(layer, nn.RNNBase):
                layer._flat_weights[layer._flat_weights_names.index(attribute)] = values[name]

    def __call__(self, values: Parameters, inputs: Any) -> Any:
        if self.buffers == "call":
            self.restore()
        self._put(values)
        try:
            # What PyTorch can differentiate twice.
            with sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable() if self.replaces else nullcontext():
                return self.net(inputs)
        finally:
            self._put(self.values)
            if self.buffers == "call":
                self.restore()


def split(episode: Any) -> Iterator[Any]:
    """The tasks of an episode, one by one."""
    for task in range(len(pytree.tree_leaves(episode)[0])):
        yield pytree.tree_map(lambda part, task=task: part[task], tuple(episode))


def fast_weights(
    call: Swapped, start: Parameters, names: list[str], x: Any, y: Any, lr: float, steps: int, loss: Loss, exact: bool
) -> Iterator[Parameters]:
    """``theta_0 … theta_S`` of one task, of which ``names`` adapt; ``exact`` keeps their graph."""
    fast = start
    yield fast
    for _ in range(steps):
        inner = loss(call(fast, x), y)
        wanted = [fast[name] for name in names]
        grads = torch.autograd.grad(inner, wanted, create_graph=exact, materialize_grads=True)
        fast = {**fast, **{name: fast[name] - lr * grad for name, grad in zip(names, grads, strict=True)}}
        yield fast


def meta_gradient(
    net: nn.Module,
    episode: Any,
    lr: float,
    steps: int,
    loss: Loss,
    first_order: bool = False,
    buffers: str = "call",
    adapted: Callable[[str], bool] = lambda name: True,
    outputs_before: bool = True,
) -> Result:
    """The mean over tasks of ``L_q(theta_S)``, its gradient, and the query outputs at ``theta_0 … theta_S``.

    Args:
        net: the network, in the mode that it is in; its parameters are ``theta_0``.
        episode: ``(support_inputs, support_targets, query_inputs, query_targets)`` with the tasks first.
        lr: inner learning rate.
        steps: inner steps.
        loss: of ``(outputs, targets)``.
        first_order: whether the inner gradients count as constants.
        buffers: see :class:`Swapped`.
        adapted: whether a parameter of that name adapts in the inner loop.
        outputs_before: whether to give the outputs before the last step, too.
    """
    call = Swapped(net, buffers)
    start = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in call.values.items()}
    leaves = {name: value for name, value in start.items() if value.requires_grad}
    names = [name for name in leaves if adapted(name)]
    total = {name: torch.zeros_like(value) for name, value in leaves.items()}
    mean, outputs, tasks = 0.0, [], list(split(episode))
    for x, y, query_x, query_y in tasks:
        if buffers == "task":
            call.restore()
        path = list(fast_weights(call, start, names, x, y, lr, steps, loss, not first_order))
        query = call(path[-1], query_x)
        outer = loss(query, query_y)
        mean += outer.item() / len(tasks)
        grads = torch.autograd.grad(outer, list(leaves.values()), materialize_grads=True)
        for name, grad in zip(leaves, grads, strict=True):
            total[name] += grad / len(tasks)
        with torch.no_grad():
            before = [call(fast, query_x) for fast in path[:-1]] if outputs_before and buffers == "call" else []
        outputs.append([*before, pytree.tree_map(torch.detach, query)])
    return Result(mean, total, outputs)


def relative_error(ours: dict[str, Tensor | None], theirs: dict[str, Tensor]) -> float:
    """Largest error of a tensor, relative to the norm of the whole gradient; parameters are matched by position."""
    norm = torch.stack([value.norm().double() for value in theirs.values()]).norm().clamp_min(1e-12)
    pairs = list(zip(ours.values(), theirs.values(), strict=True))
    return max(((torch.zeros_like(b) if a is None else a) - b).norm().item() for a, b in pairs) / norm.item()
