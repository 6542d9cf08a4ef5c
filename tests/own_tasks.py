"""Task distributions as a user would write them."""

import numpy as np
import torch

from maml_lightning import Episode


def line(seed: int, index: int) -> tuple:
    """Points on a line through 0 with a slope of its own."""
    numbers = np.random.default_rng([seed, index])
    slope, x = numbers.normal(), numbers.normal(size=(10, 1)).astype(np.float32)
    return x[:4], np.float32(slope) * x[:4], x[4:], np.float32(slope) * x[4:]


class Centers:
    """Two classes around centers of their own, drawn from torch's global generator."""

    def __init__(self, shots: int = 2):
        self.shots = shots

    def __call__(self, seed: int, index: int) -> Episode:
        centers, labels = 5 * torch.randn(2, 3), torch.arange(2).repeat_interleave(self.shots)
        support, query = (centers[labels] + torch.randn(len(labels), 3) for _ in range(2))
        return Episode(support, labels, {"x": query, "index": torch.full_like(labels, index)}, labels)


class Classes(Centers):
    def __call__(self, seed: int, index: int) -> Episode:
        episode = super().__call__(seed, index)
        return episode._replace(query_inputs=episode.query_inputs["x"])
