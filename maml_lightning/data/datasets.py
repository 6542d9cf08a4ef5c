"""Drawing of few-shot episodes: episode ``i`` of a split is a function of (seed, split, ``i``) alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maml_lightning.data.examples import Examples, Reader, Tree, take
from maml_lightning.data.pictures import AS_THEY_ARE, Preparation
from maml_lightning.data.random_numbers import Bits, Integers, below, choose, random_bits, spread
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place, mapped

Split = Literal["train", "val", "test"]
Layout = Literal["balanced", "random"]  # of the queries of an episode over its classes
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TaskDataset(Dataset[Episode], ABC):
    """Episodes of one split, any of them at any time; a kind of task adds `__getitems__`.

    Args:
        split: name of the split; its episodes depend on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        shots: support examples (per class) ``K``, at least 1.
        query_shots: query examples (per class) ``Q``, at least 1.
        seed: seed of the episodes.
    """

    def __init__(self, split: str, episodes: int, *, shots: int = 1, query_shots: int = 1, seed: int):
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

    Examples are ordered by label: ``K`` of label 0, then ``K`` of label 1, and so on, in the query set likewise. Inputs
    ``[(C,) H, W]`` of type uint8 are pictures, and 255 becomes 1.0; all others are as they are.

    Args:
        examples: of the classes; or images ``[classes, examples, (C,) H, W]``, uint8.
        split: name of the split; its episodes depend on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        ways: classes per episode ``N``, at least 2; at least 1 if the examples have targets of their own.
        shots: support examples per class ``K``, at least 1.
        query_shots: query examples per class ``Q``, at least 1.
        seed: seed of the episodes.
        rotations: whether each class rotated by 90, 180 and 270 degrees is a class of its own (square images); with
            "drawn" each episode draws by which of the four it rotates each of its classes.
        pretraining: return the examples of a batch of episodes as one query set without a support set, labeled with
            their classes among all of the split's.
        counts: how many examples each class has, if that differs; ``examples`` is then ``[sum of counts, C, H, W]``.
        groups: a group number for each class, if all classes of an episode must be of one group. Each group with
            enough classes is equally likely; rotated classes form groups of their own.
        pictures: augmentation and normalization of the inputs.
        query_layout: ``balanced`` gives each class ``Q`` queries. ``random`` draws the class of each of the ``N*Q``
            queries anew, each class that has an example left equally likely; pretraining data stay balanced.

    Raises:
        SettingError: the split (or each of its groups) has too few classes, or too few examples per class; or the
            inputs cannot be rotated or normalized.
    """

    def __init__(
        self,
        examples: Tensor | Examples,
        split: str,
        episodes: int,
        *,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        seed: int = 0,
        rotations: bool | Literal["drawn"] = False,
        pretraining: bool = False,
        counts: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        pictures: Preparation = AS_THEY_ARE,
        query_layout: Layout = "balanced",
    ):
        super().__init__(split, episodes, shots=shots, query_shots=query_shots, seed=seed)
        if not isinstance(examples, Examples):
            examples = images(examples, counts)
        _check_sizes(examples, split, ways, shots, query_shots)
        if examples.targets is not None and (rotations or pretraining):
            name = ("eval_rotations" if rotations == "drawn" else "rotations") if rotations else "pretraining"
            raise SettingError(
                f"data.{name} true needs classes as targets, but the {split} split has others; leave it out."
            )
        pictures.check(examples.inputs)
        if pictures.augmentation and examples.targets is not None:
            _check_augmentation(examples)
        self.drawn_rotations = rotations == "drawn"
        turns = 4 if rotations and not self.drawn_rotations else 1
        # rotated once, not after each draw: four times the memory, a third of the time
        self.examples = rotated(examples) if rotations else examples
        self.counts = np.array(self.examples.counts, np.int64)
        self.starts = torch.from_numpy(self.counts.cumsum() - self.counts)
        self.ways, self.pretraining, self.classes = ways, pretraining, len(examples.counts) * turns
        self.pictures, self.query_layout = pictures, query_layout
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

    @property
    def images(self) -> Tree | Reader:
        """The inputs that episodes are drawn from, each tensor ``[examples, ...]``, rotated ones included."""
        return self.examples.inputs

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which classes and examples make up balanced episodes: ``[T, N]`` and ``[T, N, K + Q]``, support first.

        With rotations, class ``c + r * classes`` is class ``c`` rotated ``r`` times by 90 degrees, counter-clockwise;
        where they are drawn, an episode has a class but once.
        """
        per_class = self.shots + self.query_shots
        bits = random_bits(self.seed, self.split, indices, 2 * self.ways * (1 + per_class) + 1)
        groups = [self.groups[group] for group in below(bits[:, -1], len(self.groups))]
        chosen = choose(bits[:, : 2 * self.ways], np.array([len(members) for members in groups]))
        classes = np.stack([members[places] for members, places in zip(groups, chosen, strict=True)])
        if self.drawn_rotations:
            turns = random_bits(self.seed, f"{self.split} rotations", indices, self.ways)
            classes = classes + self.classes * below(turns, 4)
        bits = bits[:, 2 * self.ways : -1].reshape(len(indices), self.ways, 2 * per_class)
        examples = choose(bits, self.counts[classes])
        return torch.from_numpy(classes), torch.from_numpy(examples)

    def _draw_queries(self, indices: Sequence[int], classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which examples make up episodes whose queries are of classes at random.

        Args:
            indices: of the episodes, ``[T]``.
            classes: of each, ``[T, N]``.

        Returns:
            the support examples ``[T, N, K]``, the labels of the queries in ascending order ``[T, N*Q]``, and their
            examples ``[T, N*Q]``.
        """
        queries, counts = self.ways * self.query_shots, self.counts[classes.numpy()]
        largest = np.minimum(counts, self.shots + queries)  # how many examples of a class there can be
        bits = random_bits(self.seed, f"{self.split} queries", indices, queries)
        labels = torch.from_numpy(spread(bits, largest - self.shots))
        slots = 2 * (self.shots + queries)
        bits = random_bits(self.seed, f"{self.split} layout", indices, self.ways * slots).reshape(*counts.shape, slots)
        examples = np.zeros((*counts.shape, slots // 2), np.int64)
        for size in np.unique(largest):
            alike = largest == size
            examples[alike, :size] = choose(bits[alike, : 2 * size], counts[alike])
        drawn = torch.from_numpy(examples)
        same = (labels[..., None] == labels[..., None, :]).tril(-1).sum(-1)  # queries of the class before this one
        chosen = drawn.flatten(1).gather(1, labels * drawn.shape[-1] + self.shots + same)
        return drawn[..., : self.shots], labels, chosen

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch; classes as targets are int64."""
        classes, examples = self.draw(indices)
        rows = self._rows(classes[..., None], examples)
        seeds = random_bits(self.seed, f"{self.split} transforms", indices, 2)
        if self.pretraining:
            inputs = self._inputs(rows.flatten(1), seeds[:, 0])
            inputs = mapped(lambda leaf: leaf.flatten(0, 1)[None], inputs)
            targets = classes.flatten().repeat_interleave(examples.shape[-1])[None]
            return Episode(mapped(lambda leaf: leaf[:, :0], inputs), targets[:, :0], inputs, targets)
        labels = torch.arange(self.ways).expand_as(classes)
        sets = [(labels.repeat_interleave(self.shots, 1), rows[..., : self.shots].flatten(1))]
        if self.query_layout == "balanced":
            sets += [(labels.repeat_interleave(self.query_shots, 1), rows[..., self.shots :].flatten(1))]
        else:
            support, queries, chosen = self._draw_queries(indices, classes)
            sets = [(sets[0][0], self._rows(classes[..., None], support).flatten(1))]
            sets += [(queries, self._rows(classes.gather(1, queries), chosen))]
        parts: list[Tree] = []
        for part, (targets, drawn) in enumerate(sets):
            parts += [self._inputs(drawn, seeds[:, part]), self._targets(targets, drawn, seeds[:, part])]
        return Episode(*parts)

    def _rows(self, classes: Tensor, examples: Tensor) -> Tensor:
        """The rows of examples of classes."""
        rows = self.starts[classes] + examples
        return rows if self.examples.rows is None else self.examples.rows[rows]

    def with_example(self, examples: Examples, row: int) -> Episode:
        """The first episode with an example of another split in it: the first of its support set and of its query set.

        Args:
            examples: whose inputs and targets are like those of this split.
            row: of the example.
        """
        rows, episode = torch.tensor([[row]]), self[0]
        inputs = self.pictures.prepare(take(examples.inputs, rows, [0]), 1, [0])
        targets = None if examples.targets is None else take(examples.targets, rows, [0])
        parts = zip(episode, (inputs, targets) * 2, strict=True)
        return Episode(*(part if new is None else mapped(_with_first, part, new) for part, new in parts))

    def _inputs(self, rows: Tensor, seeds: Bits) -> Tree:
        """The inputs of these rows ``[T, n]``, each tensor ``[T, n, ...]``."""
        inputs = take(self.examples.inputs, rows, seeds.tolist())
        return _by_task(self.pictures.prepare(inputs, len(rows), seeds.tolist()), rows)

    def _targets(self, labels: Tensor, rows: Tensor, seeds: Bits) -> Tree:
        """The targets of these rows ``[T, n]``, each tensor ``[T, n, ...]``: their labels, or those of their own."""
        if self.examples.targets is not None:
            return _by_task(take(self.examples.targets, rows, seeds.tolist()), rows)
        return labels


def images(pixels: Tensor, counts: Sequence[int] | None = None) -> Examples:
    """The examples of images ``[classes, examples, (C,) H, W]``, or ``[n, C, H, W]`` and how many each class has."""
    if counts is not None:
        return Examples(pixels, counts)
    channels = pixels if pixels.ndim == 5 else pixels.unsqueeze(2)
    return Examples(channels.flatten(0, 1), [pixels.shape[1]] * pixels.shape[0])


def rotated(examples: Examples) -> Examples:
    """The examples with each class rotated by 90, 180 and 270 degrees as further classes.

    Raises:
        SettingError: the inputs are not square images.
    """
    inputs, count = examples.inputs, len(examples.counts)
    if not isinstance(inputs, Tensor) or inputs.ndim < 3 or inputs.shape[-1] != inputs.shape[-2]:
        shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else "of several tensors, or not in memory"
        raise SettingError(
            f"data.rotations and data.eval_rotations need square pictures, but examples are {shape}; leave it out."
        )
    names = [f"{examples.name(index)} rotated by {90 * turn}" for turn in range(1, 4) for index in range(count)]
    rows = examples.rows
    return Examples(
        torch.cat([inputs.rot90(turn, (-2, -1)) for turn in range(4)]),
        [*examples.counts] * 4,
        [*(examples.name(index) for index in range(count)), *names],
        None if rows is None else torch.cat([rows + turn * len(inputs) for turn in range(4)]),
    )


def _check_augmentation(examples: Examples) -> None:
    """Check that no targets are of an example's pixels: they would stay where they are when it is moved."""
    rows = torch.tensor([[examples.row(0)]])
    inputs, targets = (by_place(take(part, rows, [0])) for part in (examples.inputs, examples.targets))
    sizes = {tuple(leaf.shape[-2:]) for leaf in inputs.values() if leaf.ndim > 2}
    for leaf in targets.values():
        if leaf.ndim > 2 and tuple(leaf.shape[-2:]) in sizes:
            raise SettingError(
                f"data.augmentation changes inputs alone, but their targets {list(leaf.shape[1:])} are of pixels; "
                "leave it out."
            )


def _check_sizes(examples: Examples, split: str, ways: int, shots: int, query_shots: int) -> None:
    least = 2 if examples.targets is None else 1
    if ways < least:
        raise SettingError(f"data.ways must be at least {least} (got {ways}); raise it.")
    if len(examples.counts) == 0:
        raise SettingError(f"The {split} split is empty; give it examples of at least {ways} classes.")
    smallest = int(np.argmin(examples.counts))
    if shots + query_shots > (count := examples.counts[smallest]):
        raise SettingError(
            f"data.shots + data.query_shots is {shots} + {query_shots}, but class {examples.name(smallest)} of the "
            f"{split} split has {count} examples; lower one of the two, or leave the class out."
        )


def _with_first(leaf: Tensor, example: Tensor) -> Tensor:
    """Examples ``[1, n, ...]`` with another one ``[1, ...]`` in place of the first, if there is one."""
    return torch.cat([example[None], leaf[:, 1:]], 1) if leaf.shape[1] else leaf


def _by_task(tree: Tree, rows: Tensor) -> Tree:
    return mapped(lambda leaf: leaf.view(*rows.shape, *leaf.shape[1:]), tree)


def _members(groups: Sequence[int], turns: int) -> list[Integers]:
    """The classes of each group, each rotation a group of its own."""
    return [
        np.flatnonzero(np.array(groups) == group) + turn * len(groups)
        for turn in range(turns)
        for group in sorted(set(groups))
    ]
