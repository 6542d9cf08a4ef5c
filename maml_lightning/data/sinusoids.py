"""Sinusoids: the regression tasks of the MAML paper (Finn, Abbeel and Levine 2017, section 5.1).

A task is ``y = A sin(x + phase)`` with its own amplitude ``A`` and phase; its examples are points ``(x, y)``.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maml_lightning.data.datasets import Split, TaskDataset
from maml_lightning.data.modules import TaskDataModule
from maml_lightning.data.random_numbers import random_bits, uniform
from maml_lightning.episodes import Episode

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


class SinusoidDataset(TaskDataset):
    """Sinusoids of one split: amplitude, phase and every ``x`` uniform in the paper's ranges.

    Args:
        split: name of the split; its episodes depend on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        shots: support points ``K``, at least 1.
        query_shots: query points ``Q``, at least 1.
        seed: seed of the episodes.
    """

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch: ``[T, K, 1]`` and ``[T, Q, 1]``, float32."""
        bits = random_bits(self.seed, self.split, indices, 2 + self.shots + self.query_shots)
        lowest, highest = np.array([AMPLITUDES, PHASES] + [INPUTS] * (self.shots + self.query_shots)).T
        amplitude, phase, x = np.split(lowest + (highest - lowest) * uniform(bits), [1, 2], axis=1)
        y = amplitude * np.sin(x + phase)
        tensors: list[Tensor] = []
        for part in (slice(self.shots), slice(self.shots, None)):
            tensors += [torch.from_numpy(values[:, part, None]).float() for values in (x, y)]
        return Episode(*tensors)


class SinusoidsDataModule(TaskDataModule):
    """Sinusoids of amplitude 0.1 to 5 and phase 0 to pi, at points in [-5, 5]. Needs a regression loss and the MLP.

    Args:
        shots: support points ``K``, at least 1.
        query_shots: query points ``Q``, at least 1.

    Raises:
        SettingError: a setting is out of range.
    """

    score = "mse"

    def __init__(
        self,
        shots: int = 10,
        query_shots: int = 10,
        meta_batch_size: int = 25,
        train_episodes: int = 25000,
        test_episodes: int = 600,
        **settings: int,
    ):
        super().__init__(
            shots=shots,
            query_shots=query_shots,
            meta_batch_size=meta_batch_size,
            train_episodes=train_episodes,
            test_episodes=test_episodes,
            **settings,
        )

    def make_dataset(self, split: Split) -> SinusoidDataset:
        """Sinusoids of their own for each split."""
        return SinusoidDataset(
            split, self.episodes[split], shots=self.shots, query_shots=self.query_shots, seed=self.seed
        )
