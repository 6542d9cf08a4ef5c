"""An independent meta-gradient: plain autograd, task by task, nothing of the package's."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_lightning import Episode


def reference(net: nn.Module, episode: Episode, lr: float, steps: int, loss, first_order: bool = False):
    start = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    mean_loss = 0.0
    for x, y, query_x, query_y in zip(*episode, strict=True):
        fast = start
        for _ in range(steps):
            inner = loss(functional_call(net, fast, (x,)), y)
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=not first_order)
            fast = {name: value - lr * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
        outer = loss(functional_call(net, fast, (query_x,)), query_y)
        mean_loss += outer.item() / episode.tasks
        for name, grad in zip(start, torch.autograd.grad(outer, list(start.values())), strict=True):
            total[name] += grad / episode.tasks
    return mean_loss, total


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest error of a tensor, relative to the norm of the whole gradient."""
    norm = torch.cat([value.flatten() for value in theirs.values()]).norm()
    return max(((ours[name] - value).norm() / norm).item() for name, value in theirs.items())


def images(tasks: int = 4, ways: int = 3, shots: int = 2, query_shots: int = 2, size: int = 10, channels: int = 1):
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(tasks, ways * count, channels, size, size, generator=generator, dtype=torch.float64)
        return x, torch.arange(ways).repeat_interleave(count).repeat(tasks, 1)

    return Episode(*part(shots), *part(query_shots))


def perturbed(net: nn.Module) -> nn.Module:
    """In float64, with parameters off their initial zeros and ones."""
    torch.manual_seed(3)
    net = net.double()
    with torch.no_grad():
        for value in net.parameters():
            value += 0.1 * torch.randn_like(value)
    return net
