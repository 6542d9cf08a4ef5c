"""An independent meta-gradient: plain autograd, task by task, nothing of the package's."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

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


MODES = ("output", "input", "filter")


def curved(gradient: Tensor, matrices: list) -> Tensor:
    """Meta-Curvature: the n-mode products of a gradient with ``[1, n, n]`` matrices; of a vector, its factors."""
    if gradient.dim() < 2:
        return gradient if matrices[0] is None else gradient * matrices[0][0]
    result = gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)
    for matrix, product in zip(matrices, ("ab,bif->aif", "ab,obf->oaf", "ab,oib->oia"), strict=True):
        if matrix is not None:
            result = torch.einsum(product, matrix[0].to(result.dtype), result)
    return result.reshape(gradient.shape)


def squared(value: Tensor) -> Tensor:
    return (value * value.conj()).real


@sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative
def family(maml: nn.Module, net: nn.Module, episode: Episode, loss, steps: int, **settings):
    """The gradient of every parameter of ``maml`` under ``settings``, with the outer loss.

    ``net`` is what ``maml`` was made of, before: its parameters are the initialisation.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in maml.named_parameters()}
    adapted, names = settings["adapted"], list(dict(net.named_parameters()))
    rates, by_step = "adaptation.learnt.", "adaptation.by_step."

    per_step = {name: by_step + name.replace(".", "/") for name in names}
    per_step = {name: key for name, key in per_step.items() if key in leaves}

    def parameters_at(fast, k):
        return {**fast, **{name: leaves[key][k] for name, key in per_step.items()}}

    def rate(name, k):
        key = next((key for key in (rates + name.replace(".", "/"), rates + "all") if key in leaves), None)
        return settings["inner_lr"] if key is None else leaves[key][min(k, len(leaves[key]) - 1)]

    def matrix(name, mode):
        return f"adaptation.curvature.{name.replace('.', '/')}/{mode}"

    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(*episode, strict=True):
        fast = {name: leaves[f"net.{name}"] for name in names if name not in per_step}
        buffer = dict.fromkeys(adapted, 0.0)
        square = dict.fromkeys(adapted, 0.0)
        for k in range(steps + 1):
            if settings["weights"][k]:
                total = total + settings["weights"][k] * loss(
                    functional_call(net, parameters_at(fast, k), (query_x,)), query_y
                )
            if k == steps:
                break
            inner = loss(functional_call(net, parameters_at(fast, k), (x,)), y)
            inner = inner + settings.get("proximal", 0) / 2 * sum(
                squared(fast[name] - leaves[f"net.{name}"]).sum() for name in adapted
            )
            create = not settings.get("first_order", False)
            grads = dict(
                zip(adapted, torch.autograd.grad(inner, [fast[n] for n in adapted], create_graph=create), strict=True)
            )
            grads = {name: curved(g, [leaves.get(matrix(name, mode)) for mode in MODES]) for name, g in grads.items()}
            clip = settings.get("clip")
            norm = torch.cat([g.flatten() for g in grads.values()]).norm()
            if clip is not None and norm > clip:
                grads = {name: g * clip / norm for name, g in grads.items()}
            for name, g in grads.items():
                g = g + settings.get("decay", 0.0) * fast[name]
                if settings.get("optimizer") == "momentum":
                    buffer[name] = 0.9 * buffer[name] + g
                    g = buffer[name]
                if settings.get("optimizer") == "adam":
                    buffer[name] = 0.9 * buffer[name] + 0.1 * g
                    square[name] = 0.999 * square[name] + 0.001 * squared(g)
                    mean, second = buffer[name] / (1 - 0.9 ** (k + 1)), square[name] / (1 - 0.999 ** (k + 1))
                    g = mean / torch.sqrt(second + 1e-8)
                fast = {**fast, name: fast[name] - rate(name, k) * g}
    (total / episode.tasks).backward()
    return total.item() / episode.tasks, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


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
