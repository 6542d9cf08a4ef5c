"""Drawing of few-shot episodes: episode ``i`` of a split is a function of (seed, split, ``i``) alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maml_lightning.data.random_numbers import Integers, below, choose, random_bits
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError

Split = Literal["train", "val", "test"]


class TaskDataset(Dataset[Episode], ABC):
    """Episodes of one split, any of them at any time; a kind of task adds `__getitems__`.

    Args:
        split: name of the split; its episodes depend on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        shots: support examples (per class) ``K``, at least 1.
        query_shots: query examples (per class) ``Q``, at least 1.
        seed: seed of the episodes.
    """

    def __init__(self, split: str, episodes: int, *, shots: int, query_shots: int, seed: int):
        self.split, self.episodes, self.seed = split, episodes, seed
        self.shots, self.query_shots = shots, query_shots

    def __len__(self) -> int:
        return self.episodes

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch."""

    def __getitem__(self, index: int) -> Episode:
        return self.__getitems__([index])


class EpisodeDataset(TaskDataset):
    """Episodes drawn from the examples of one split's classes; a whole meta-batch is one gather.

    Examples are ordered by label: ``K`` of label 0, then ``K`` of label 1, and so on, in the query set likewise.

    Args:
        images: ``[classes, examples, H, W]`` or ``[classes, examples, C, H, W]``, uint8; 255 becomes 1.0.
        counts: how many examples each class has, if that differs; ``images`` is then ``[sum of counts, C, H, W]``.
        split: name of the split; its episodes depend on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        ways: classes per episode ``N``, at least 2.
        shots: support examples per class ``K``, at least 1.
        query_shots: query examples per class ``Q``, at least 1.
        seed: seed of the episodes.
        rotations: whether each class rotated by 90, 180 and 270 degrees is a class of its own (square images).
        pretraining: return the examples of a batch of episodes as one query set without a support set, labeled with
            their classes among all of the split's.
        groups: a group number for each class, if all classes of an episode must be of one group. Each group with
            enough classes is equally likely; rotated classes form groups of their own.

    Raises:
        SettingError: the split (or each of its groups) has too few classes, or too few examples per class.
    """

    def __init__(
        self,
        images: Tensor,
        split: str,
        episodes: int,
        *,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        seed: int = 0,
        rotations: bool = False,
        pretraining: bool = False,
        counts: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ):
        super().__init__(split, episodes, shots=shots, query_shots=query_shots, seed=seed)
        if counts is None:
            counts = [images.shape[1]] * images.shape[0]
            images = (images if images.ndim == 5 else images.unsqueeze(2)).flatten(0, 1)
        turns = 4 if rotations else 1
        # rotated once, not after each draw: four times the memory, a third of the time
        self.images = torch.cat([images.rot90(turn, (-2, -1)) for turn in range(4)]) if rotations else images
        self.counts = np.array([*counts] * turns, np.int64)
        self.starts = torch.from_numpy(self.counts.cumsum() - self.counts)
        self.ways, self.pretraining, self.classes = ways, pretraining, len(self.counts)
        if ways > self.classes:
            raise SettingError(
                f"data.ways is {ways}, but the {split} split has {self.classes} classes; lower data.ways."
            )
        all_groups = [range(self.classes)] if groups is None else _members(groups, turns)
        self.groups = [np.array(members) for members in all_groups if len(members) >= ways]
        if not self.groups:
            raise SettingError(
                f"data.ways is {ways}, but the largest group of the {split} split has {max(map(len, all_groups))} "
                "classes; lower data.ways."
            )
        if shots + query_shots > self.counts.min():
            raise SettingError(
                f"data.shots + data.query_shots is {shots} + {query_shots}, but a class of the {split} split has "
                f"{self.counts.min()} examples; lower one of the two."
            )

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which classes and examples make up the episodes: ``[T, N]`` and ``[T, N, K + Q]``, support first.

        With rotations, class ``c + r * classes`` is class ``c`` rotated ``r`` times by 90 degrees, counter-clockwise.
        """
        per_class = self.shots + self.query_shots
        bits = random_bits(self.seed, self.split, indices, 2 * self.ways * (1 + per_class) + 1)
        groups = [self.groups[group] for group in below(bits[:, -1], len(self.groups))]
        chosen = choose(bits[:, : 2 * self.ways], np.array([len(members) for members in groups]))
        classes = np.stack([members[places] for members, places in zip(groups, chosen, strict=True)])
        bits = bits[:, 2 * self.ways : -1].reshape(len(indices), self.ways, 2 * per_class)
        examples = choose(bits, self.counts[classes])
        return torch.from_numpy(classes), torch.from_numpy(examples)

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch: inputs float in [0, 1], targets int64."""
        classes, examples = self.draw(indices)
        if self.pretraining:
            inputs = self._gather(classes, examples).flatten(0, 1)[None]
            targets = classes.flatten().repeat_interleave(examples.shape[-1])[None]
            return Episode(inputs[:, :0], targets[:, :0], inputs, targets)
        tensors: list[Tensor] = []
        for part in (examples[..., : self.shots], examples[..., self.shots :]):
            labels = torch.arange(self.ways).repeat_interleave(part.shape[-1])
            tensors += [self._gather(classes, part), labels.repeat(len(indices), 1)]
        return Episode(*tensors)

    def _gather(self, classes: Tensor, examples: Tensor) -> Tensor:
        rows = (self.starts[classes][..., None] + examples).flatten(1)
        inputs = self.images.index_select(0, rows.flatten())
        return inputs.view(*rows.shape, *inputs.shape[1:]).float().div_(255)


def _members(groups: Sequence[int], turns: int) -> list[Integers]:
    """The classes of each group, each rotation a group of its own."""
    return [
        np.flatnonzero(np.array(groups) == group) + turn * len(groups)
        for turn in range(turns)
        for group in sorted(set(groups))
    ]
