"""Sinusoids: the regression tasks of the MAML paper (Finn, Abbeel and Levine 2017, section 5.1).

A task is ``y = A sin(x + phase)`` with its own amplitude ``A`` and phase, known by a few points ``(x, y)``.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maml_lightning.data.episodic import Split, TaskDataModule, TaskDataset, random_bits
from maml_lightning.episodes import Episode

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


class SinusoidDataset(TaskDataset):
    """Sinusoids of one split: amplitude, phase and every ``x`` uniform in the paper's ranges.

    Args:
        split: name of the split, a part of what an episode depends on.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        shots: support points ``K``, at least 1.
        query_shots: query points ``Q``, at least 1.
        seed: the data seed.
    """

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch: ``[T, K, 1]`` and ``[T, Q, 1]``, float32."""
        bits = random_bits(self.seed, self.split, indices, 2 + self.shots + self.query_shots)
        uniform = (bits >> np.uint64(11)) * 2.0**-53  # the 53 bits that a double holds, in [0, 1)
        lowest, highest = np.array([AMPLITUDES, PHASES] + [INPUTS] * (self.shots + self.query_shots)).T
        amplitude, phase, x = np.split(lowest + (highest - lowest) * uniform, [1, 2], axis=1)
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
        meta_batch_size: episodes per outer step ``T``, over all processes.
        train_episodes: episodes per epoch, a multiple of ``meta_batch_size``.
        val_episodes: episodes per validation, always the same.
        test_episodes: episodes per test, always the same.
        seed: seed of the episodes, any integer.
        num_workers: worker processes per data loader; 0 samples in the main process.

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
        val_episodes: int = 600,
        test_episodes: int = 600,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            shots=shots,
            query_shots=query_shots,
            meta_batch_size=meta_batch_size,
            train_episodes=train_episodes,
            val_episodes=val_episodes,
            test_episodes=test_episodes,
            seed=seed,
            num_workers=num_workers,
        )

    def make_dataset(self, split: Split) -> SinusoidDataset:
        """Sinusoids of their own for each split."""
        return SinusoidDataset(
            split, self.episodes[split], shots=self.shots, query_shots=self.query_shots, seed=self.seed
        )
