"""Networks as a user would write them."""

import torch
from torch import Tensor, nn


class OwnNet(nn.Module):
    def __init__(self, out_features: int = 2, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=4), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Flatten()
        )
        self.head = nn.LazyLinear(out_features)
        self.head(self.layers(torch.zeros(2, 1, 28, 28)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class FixedNet(nn.Module):
    """Has no ``out_features`` to set."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(28 * 28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Branching(nn.Module):
    """Reads a value in Python, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.head = nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1).tanh() * self.scale) if float(torch.ones(()).detach()) > 0 else x


class Wide(nn.Module):
    """Shares a setting's name with ConvNet, not its default."""

    def __init__(self, hidden_channels: int = 6, out_features: int = 2) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(28 * 28, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, out_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
