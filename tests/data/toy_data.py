"""A data set as a user would add it: one file, written from the base class alone."""

import math
from typing import Any

import torch
from torch import Tensor

from maml_lightning.data import EpisodicDataModule, Split


class ToyDataModule(EpisodicDataModule):
    """Episodes of bars on 16x16 pixels, a class for each angle; no two splits share an angle.

    Args:
        angles: classes of each split, at least ``ways``.
        noise: standard deviation of the gray values, of 255.
    """

    def __init__(self, angles: int = 40, noise: float = 10.0, *, query_shots: int = 2, **settings: Any):
        super().__init__(query_shots=query_shots, **settings)
        self.angles, self.noise = angles, noise

    def load_split(self, split: Split) -> Tensor:
        """The images of a split: ``[angles, 20, 16, 16]``, uint8."""
        place = ("train", "val", "test").index(split)
        angle = (torch.arange(self.angles)[:, None, None, None] * 3 + place) * math.pi / (3 * self.angles)
        y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
        bars = 255.0 * ((x * angle.sin() - y * angle.cos()).abs() < 1.5)
        noise = self.noise * torch.randn(self.angles, 20, 16, 16, generator=torch.Generator().manual_seed(place))
        return (bars + noise).clamp(0, 255).byte()
