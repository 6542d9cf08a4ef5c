"""The cases that are measured: a network, the shape of its inputs, and how many of them a task has."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning import ConvNet, Episode


class LSTM(nn.Module):
    """One layer over sequences ``[B, L, 16]``, and a linear head on its last output."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, ways)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.body(sequences)[0][:, -1])


class Transformer(nn.Module):
    """Two encoder layers over sequences ``[B, L, 16]``, and a linear head on the mean over positions."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, ways)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(sequences)).mean(1))


class Adapter(nn.Module):
    """A frozen linear layer and a correction of rank 4 (Hu et al. 2022)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())
        self.down = nn.Parameter(0.1 * torch.randn(4, layer.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.down.mT @ self.up.mT


class LoRA(nn.Module):
    """Two frozen transformer layers with adapters on their linear layers; adapters and head are trained."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        sizes = {"qkv": (64, 192), "out": (64, 64), "up": (64, 128), "down": (128, 64)}
        self.embedding = Adapter(nn.Linear(16, 64))
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Adapter(nn.Linear(*size)) for name, size in sizes.items()}) for _ in range(2)
        )
        self.head = nn.Linear(64, ways)

    def forward(self, sequences: Tensor) -> Tensor:
        x = self.embedding(sequences)
        for layer in self.layers:
            q, k, v = layer["qkv"](F.layer_norm(x, (64,))).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](F.layer_norm(x, (64,)))))
        return self.head(x.mean(1))


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        sizes = [(channels, 3), (out, 3), (out, 3), (channels, 1)]
        self.convolutions = nn.ModuleList(nn.Conv2d(c, out, k, padding=k // 2, bias=False) for c, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out, track_running_stats=False) for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        *layers, shortcut = zip(self.convolutions, self.norms, strict=True)
        y = x
        for number, (convolution, norm) in enumerate(layers):
            y = norm(convolution(y))
            y = F.leaky_relu(y, 0.1) if number < 2 else y
        return F.max_pool2d(F.leaky_relu(y + shortcut[1](shortcut[0](x)), 0.1), 2)


class ResNet12(nn.Module):
    """ResNet-12 (Lee et al. 2019) at a quarter of its width, for colour images ``[B, 3, H, W]``."""

    def __init__(self, ways: int) -> None:
        super().__init__()
        widths = [3, 16, 40, 80, 160]
        self.body = nn.Sequential(*(_Residual(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(widths[-1], ways)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def _pooled(ways: int) -> nn.Module:
    return ConvNet(out_features=ways, pooling=True)


def _strided(ways: int) -> nn.Module:
    return ConvNet(out_features=ways)


class Case(NamedTuple):
    name: str
    tasks: int = 32
    ways: int = 5
    shots: int = 1
    query_shots: int = 1
    steps: int = 1
    make: Callable[[int], nn.Module] = _strided
    shape: tuple[int, ...] = (1, 28, 28)


CASES = {
    "1": Case("5-way 1-shot, 1 step"),
    "2": Case("5-way 1-shot, 5 steps", steps=5),
    "3": Case("20-way 5-shot, 5 steps", tasks=16, ways=20, shots=5, steps=5),
    "4": Case("5-way 1-shot, 15 queries, max-pooled", query_shots=15, make=_pooled),
    "LSTM": Case("LSTM, 20 time steps", tasks=16, query_shots=3, make=LSTM, shape=(20, 16)),
    "transformer": Case("transformer, 20 positions", tasks=16, query_shots=3, make=Transformer, shape=(20, 16)),
    "ResNet-12": Case("ResNet-12, quarter width, 84x84", tasks=2, query_shots=3, make=ResNet12, shape=(3, 84, 84)),
    "LoRA": Case("LoRA, frozen transformer", tasks=16, query_shots=3, make=LoRA, shape=(20, 16)),
}
POOLED = Case("max-pooled", tasks=16, make=_pooled)


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make(case.ways)


def episodes(case: Case, device: str = "cpu", seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def part(count: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(case.tasks, case.ways * count, *case.shape, generator=generator)
        return x.to(device), torch.arange(case.ways, device=device).repeat_interleave(count).repeat(case.tasks, 1)

    return Episode(*part(case.shots), *part(case.query_shots))
