"""What a case of the zoo is, and the episodes that it is tried on."""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning import Episode

TASKS, SUPPORT, QUERY, CLASSES = 3, (0, 1, 2, 0, 1), (2, 0, 1, 2), 3
NOT_TWICE = "derivative"  # refusal of operators that PyTorch itself cannot differentiate twice
IMAGE, VECTOR, SERIES, TOKENS = (2, 8, 8), (6,), (5, 4), (6,)


class Case(NamedTuple):
    """One network and what it is tried on.

    Args:
        name: of the network.
        make: gives the network, of float64 after ``double()``.
        shape: of one example.
        tokens: 0, or inputs are integers below it.
        loss: of inner and outer loop; regression of ``[B, 3]`` where it is not the cross-entropy.
        evaluation: the network is in evaluation mode.
        change: what is done to the network between two meta-steps.
        plain: what the loop runs, where it is not the same network (a compiled one, one that recomputes its layers with
            parameters that are no longer in it).
        stateful: calls change what the outputs depend on; each usual way of a loop to treat it counts.
        quick: run by the ordinary suite, not by the long one alone.
        noise: how far parameters are moved off their initial zeros and ones.
        lr: inner learning rate.
        refusal: pattern of the error with which the case may be refused although the loop runs.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: Sequence[int] = IMAGE
    tokens: int = 0
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    evaluation: bool = False
    change: Callable[[nn.Module], Any] | None = None
    plain: Callable[[], nn.Module] | None = None
    stateful: bool = False
    quick: bool = True
    refusal: str = ""
    noise: float = 0.1
    lr: float = 0.1

    def network(self, plain: bool = False, seed: int = 3) -> nn.Module:
        """The network, with parameters off their initial zeros and ones."""
        torch.manual_seed(seed)
        random.seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm, TorchScript
            net = (self.plain if plain and self.plain else self.make)().double().train(not self.evaluation)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in net.parameters():
                real = torch.view_as_real(value) if value.is_complex() else value
                real += self.noise * torch.randn(real.shape, generator=generator, dtype=torch.float64)
        return net

    def episode(self, seed: int = 0, tasks: int = TASKS) -> Episode:
        """``tasks`` tasks of 5 support and 4 query examples, whose labels are permuted."""
        generator = torch.Generator().manual_seed(100 + seed)

        def part(labels: Sequence[int]) -> tuple[Tensor, Tensor]:
            shape = (tasks, len(labels), *self.shape)
            if self.tokens:
                x = torch.randint(self.tokens, shape, generator=generator)
            else:
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
            if self.loss is not F.cross_entropy:
                return x, torch.randn((*shape[:2], CLASSES), generator=generator, dtype=torch.float64)
            orders = [torch.randperm(len(labels), generator=generator) for _ in range(tasks)]
            return x, torch.stack([torch.tensor(labels)[order] for order in orders])

        return Episode(*part(SUPPORT), *part(QUERY))


def classifier(*layers: nn.Module, shape: Sequence[int] = IMAGE) -> nn.Sequential:
    """The layers, ``Flatten`` and a linear layer of the size that they need."""
    net = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        size = net(torch.rand(4, *shape)).shape[1]
    return net.append(nn.Linear(size, CLASSES))
