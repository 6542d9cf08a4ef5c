"""The same meta-gradient by others: each peer maps (net, episode, lr, steps) to a function without arguments.

The function returns the gradient of the mean query loss by parameter name. A peer that is not installed is absent
from ``PEERS``.
"""

import copy
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml_lightning import Episode

Run = Callable[[], dict[str, Tensor]]


def _leaves(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.zero_grad()
    return net


def _gradient(net: nn.Module, tasks: int) -> dict[str, Tensor]:
    gradient = {name: value.grad / tasks for name, value in net.named_parameters()}
    net.zero_grad()
    return gradient


def plain_loop(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """Autograd with ``create_graph=True``, task by task, as in textbooks."""
    net = _leaves(net)
    start = dict(net.named_parameters())

    def run() -> dict[str, Tensor]:
        for x, y, query_x, query_y in zip(*episode, strict=True):
            fast = start
            for _ in range(steps):
                loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: value - lr * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
            F.cross_entropy(functional_call(net, fast, (query_x,)), query_y).backward()
        return _gradient(net, episode.tasks)

    return run


def higher(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``higher.innerloop_ctx``, task by task, as in its MAML example."""
    import higher

    net = _leaves(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)

    def run() -> dict[str, Tensor]:
        for x, y, query_x, query_y in zip(*episode, strict=True):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(steps):
                    inner.step(F.cross_entropy(fast(x), y))
                F.cross_entropy(fast(query_x), query_y).backward()
        return _gradient(net, episode.tasks)

    return run


def torchopt(net: nn.Module, episode: Episode, lr: float, steps: int) -> Run:
    """``torchopt.MetaSGD`` with the network's state extracted and recovered around each task, as in its tutorial."""
    import torchopt

    net = _leaves(net)
    names = [name for name, _ in net.named_parameters()]
    inner = torchopt.MetaSGD(net, lr=lr)

    def run() -> dict[str, Tensor]:
        start = [value for _, value in net.named_parameters()]
        before, before_inner = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for x, y, query_x, query_y in zip(*episode, strict=True):
            for _ in range(steps):
                inner.step(F.cross_entropy(net(x), y))
            F.cross_entropy(net(query_x), query_y).backward()
            torchopt.recover_state_dict(net, before)
            torchopt.recover_state_dict(inner, before_inner)
        gradient = {name: value.grad / episode.tasks for name, value in zip(names, start, strict=True)}
        for value in start:
            value.grad = None
        return gradient

    return run


_NEEDS = {"plain loop": (plain_loop, "torch"), "higher": (higher, "higher"), "TorchOpt": (torchopt, "torchopt")}
PEERS = {name: peer for name, (peer, module) in _NEEDS.items() if importlib.util.find_spec(module)}
