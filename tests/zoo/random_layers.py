"""Layers that draw random numbers: exact where nothing is drawn, finite and different at each step where it is."""

import random

import torch
from torch import Tensor, nn

from maml_lightning import ResNet12
from tests.zoo.case import CLASSES, Case, classifier
from tests.zoo.images import ViewFlatten, conv
from tests.zoo.sequences import Encoder, series


class StochasticBlock(nn.Module):
    """torchvision's StochasticDepth or DropBlock after a convolution with a shortcut."""

    def __init__(self, kind: str, p: float) -> None:
        super().__init__()
        from torchvision import ops

        self.body = nn.Sequential(conv(2, 2), nn.Tanh())
        self.drop = ops.StochasticDepth(p, "row") if kind == "StochasticDepth" else ops.DropBlock2d(p, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.body(x))


class LayerDrop(nn.Module):
    """A layer left out where Python's random numbers say so."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.a, self.head, self.p = nn.Linear(128, 128), nn.Linear(128, CLASSES), p

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if random.random() >= self.p:
            x = x + torch.tanh(self.a(x))
        return self.head(x)


class Permuted(nn.Module):
    """A random layer of channels that come last in memory, as after attention or a layout for speed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1).contiguous().movedim(-1, 1))


class Noise(nn.Module):
    """Noise of each value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def make(kind: str, p: float) -> nn.Module:
    layers = {
        "Dropout": lambda: nn.Dropout(p),
        "Dropout2d": lambda: nn.Dropout2d(p),
        "AlphaDropout": lambda: nn.AlphaDropout(p),
        "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(p),
    }
    if kind in layers:
        return ViewFlatten(conv(), layers[kind](), nn.ReLU())
    if kind == "RReLU":
        return ViewFlatten(conv(), nn.RReLU(0.2, 0.2 + p))
    if kind == "LayerDrop":
        return LayerDrop(p)
    if kind == "ResNet12":
        return ResNet12(2, CLASSES, (4,), p, 3)
    return classifier(StochasticBlock(kind, p))


KINDS = ("Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout", "RReLU", "LayerDrop", "StochasticDepth",
         "DropBlock", "ResNet12")  # fmt: skip
QUICK = ("Dropout", "RReLU", "LayerDrop", "StochasticDepth")  # what the ordinary suite runs; the long one runs all

CASES = [
    *(Case(f"{kind} with p=0", lambda kind=kind: make(kind, 0.0), quick=kind in QUICK) for kind in KINDS),
    *(Case(f"{kind} in evaluation mode", lambda kind=kind: make(kind, 0.5), evaluation=True, quick=kind == "RReLU")
      for kind in KINDS if kind != "LayerDrop"),
]  # fmt: skip
PERMUTED = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout2d": lambda: nn.Dropout2d(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "RReLU": lambda: nn.RReLU(0.2, 0.7),
    "Noise": Noise,
}
RANDOM = [
    *(Case(f"{kind} with p=0.5", lambda kind=kind: make(kind, 0.5)) for kind in KINDS),
    *(Case(f"permuted {kind}", lambda layer=layer: ViewFlatten(conv(), Permuted(layer()), nn.Flatten(), nn.Tanh()))
      for kind, layer in PERMUTED.items()),
    series("TransformerEncoder with dropout", lambda: Encoder(dropout=0.5)),
]  # fmt: skip
