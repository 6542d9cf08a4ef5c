"""Sampling of few-shot episodes, the same for every data set.

Episode ``i`` of a split is a function of (seed, split, ``i``) alone. Its random bits come from a counter, not from a
generator with a state: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
hashes (seed, split, i, slot), for a whole meta-batch at once. So workers, ranks, batch size and what ran before cannot
matter, and any episode can be drawn at any time.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError

Split = Literal["train", "val", "test"]
Bits = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: Bits) -> Bits:
    """SplitMix64's finaliser, a bijection of the 64-bit integers."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_bits(seed: int, name: str, indices: Sequence[int] | npt.NDArray[np.int64], slots: int) -> Bits:
    """Random 64-bit integers that depend on (seed, name, index, slot) alone.

    Args:
        seed: any integer.
        name: keeps streams apart, such as a split's name.
        indices: ``[n]`` integers from 0; a stream of its own for each.
        slots: how many numbers of each stream.

    Returns:
        ``[n, slots]``.
    """
    key = _mix(np.array([seed % 2**64], np.uint64) + _GAMMA) ^ np.uint64(zlib.crc32(name.encode()))
    streams = _mix(_mix(key) + np.asarray(indices).astype(np.uint64) * _GAMMA)
    return _mix(streams[:, None] + np.arange(1, slots + 1, dtype=np.uint64) * _GAMMA)


def below(bits: Bits, n: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Random integers in ``[0, n)``, of the bits' shape; ``n < 2**32``."""
    return ((bits >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def choose(bits: Bits, n: int | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Draw ``k`` of ``n`` without replacement, in random order (Floyd's algorithm, then a shuffle).

    Args:
        bits: ``[..., 2 * k]`` random 64-bit integers.
        n: how many there are to draw from, ``k <= n < 2**32``; one number or ``[...]``.

    Returns:
        ``[..., k]`` distinct integers in ``[0, n)``.
    """
    k = bits.shape[-1] // 2
    chosen = np.empty((*bits.shape[:-1], k), np.int64)
    for j in range(k):
        last = np.asarray(n) - k + j
        pick = below(bits[..., j], last + 1)
        taken = (chosen[..., :j] == pick[..., None]).any(-1)
        chosen[..., j] = np.where(taken, last, pick)
    return np.take_along_axis(chosen, bits[..., k:].argsort(-1), -1)


class TaskDataset(Dataset[Episode], ABC):
    """Episodes of one split, any of them at any time; a kind of task adds `__getitems__`.

    Args:
        split: name of the split, a part of what an episode depends on.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        shots: support examples (per class) ``K``, at least 1.
        query_shots: query examples (per class) ``Q``, at least 1.
        seed: the data seed.
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
    """Episodes drawn from the images of one split; a whole meta-batch is one gather.

    Examples are ordered by label: ``K`` of label 0, then ``K`` of label 1, and so on, in the query set likewise.

    Args:
        images: ``[classes, drawings, H, W]`` or ``[classes, drawings, C, H, W]``, uint8; 255 becomes 1.0.
        counts: how many drawings each class has, where they differ; ``images`` is then ``[sum of counts, C, H, W]``.
        split: name of the split, a part of what an episode depends on.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        ways: classes per episode ``N``, at least 2.
        shots: support examples per class ``K``, at least 1.
        query_shots: query examples per class ``Q``, at least 1.
        seed: the data seed.
        rotations: whether each class turned by 90, 180 and 270 degrees counts as a class of its own (square images).
        pretraining: give the examples of a batch of episodes as one query set without a support set, labelled with
            their classes among all of the split's.
        groups: a number for each class, where all classes of an episode are to be of one group, each group with
            enough classes equally likely; turned classes are groups of their own.

    Raises:
        SettingError: the split (or each of its groups) has too few classes, or too few drawings per class.
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
        # turned once, not after each draw: four times the bytes, a third of the time
        self.images = torch.cat([images.rot90(turn, (-2, -1)) for turn in range(4)]) if rotations else images
        self.counts = np.array([*counts] * turns, np.int64)
        self.starts = torch.from_numpy(self.counts.cumsum() - self.counts)
        self.ways, self.pretraining, self.classes = ways, pretraining, len(self.counts)
        if ways > self.classes:
            raise SettingError(
                f"data.ways is {ways}, but the {split} split has {self.classes} classes; lower data.ways."
            )
        every = [range(self.classes)] if groups is None else _members(groups, turns)
        self.groups = [np.array(members) for members in every if len(members) >= ways]
        if not self.groups:
            raise SettingError(
                f"data.ways is {ways}, but the largest group of the {split} split has {max(map(len, every))} classes; "
                "lower data.ways."
            )
        if shots + query_shots > self.counts.min():
            raise SettingError(
                f"data.shots + data.query_shots is {shots} + {query_shots}, but a class of the {split} split has "
                f"{self.counts.min()} drawings; lower one of the two."
            )

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which classes and drawings make up the episodes: ``[T, N]`` and ``[T, N, K + Q]``, support first.

        With rotations, class ``c + r * classes`` is class ``c`` turned ``r`` times by 90 degrees, counter-clockwise.
        """
        examples = self.shots + self.query_shots
        bits = random_bits(self.seed, self.split, indices, 2 * self.ways * (1 + examples) + 1)
        groups = [self.groups[group] for group in below(bits[:, -1], len(self.groups))]
        picks = choose(bits[:, : 2 * self.ways], np.array([len(members) for members in groups]))
        classes = np.stack([members[pick] for members, pick in zip(groups, picks, strict=True)])
        bits = bits[:, 2 * self.ways : -1].reshape(len(indices), self.ways, 2 * examples)
        drawings = choose(bits, self.counts[classes])
        return torch.from_numpy(classes), torch.from_numpy(drawings)

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch: inputs float in [0, 1], targets int64."""
        classes, drawings = self.draw(indices)
        if self.pretraining:
            inputs = self._gather(classes, drawings).flatten(0, 1)[None]
            targets = classes.flatten().repeat_interleave(drawings.shape[-1])[None]
            return Episode(inputs[:, :0], targets[:, :0], inputs, targets)
        tensors: list[Tensor] = []
        for part in (drawings[..., : self.shots], drawings[..., self.shots :]):
            labels = torch.arange(self.ways).repeat_interleave(part.shape[-1])
            tensors += [self._gather(classes, part), labels.repeat(len(indices), 1)]
        return Episode(*tensors)

    def _gather(self, classes: Tensor, drawings: Tensor) -> Tensor:
        rows = (self.starts[classes][..., None] + drawings).flatten(1)
        inputs = self.images.index_select(0, rows.flatten())
        return inputs.view(*rows.shape, *inputs.shape[1:]).float().div_(255)


def _members(groups: Sequence[int], turns: int) -> list[npt.NDArray[np.int64]]:
    """The classes of each group, turned ones apart."""
    return [
        np.flatnonzero(np.array(groups) == group) + turn * len(groups)
        for turn in range(turns)
        for group in sorted(set(groups))
    ]


# DistributedSampler keeps Lightning from putting a DistributedSampler of its own around it under several ranks, which
# would pad the validation and test episodes with repeats; SequentialSampler from replacing it under overfit_batches.
class EpisodeSampler(DistributedSampler[int], SequentialSampler):
    """A rank's contiguous share of every meta-batch, nothing padded and nothing dropped.

    Args:
        dataset: its length is the number of episodes per epoch.
        meta_batch_size: episodes per outer step over all ranks, a multiple of the number of ranks.
        fixed: give episodes ``0 … n-1`` at every epoch (validation, test); otherwise epoch ``e`` begins at ``e * n``.
        num_replicas: number of ranks; by default that of ``torch.distributed``, or 1.
        rank: this rank; by default that of ``torch.distributed``, or 0.

    Attributes:
        skip: meta-batches to leave out at the start of the next pass, to go on in the middle of an epoch.

    Raises:
        SettingError: the meta-batch does not divide by the ranks, or (not ``fixed``) the epoch by the meta-batch, or
            there are fewer episodes than ranks.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        meta_batch_size: int,
        *,
        fixed: bool,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        distributed = dist.is_available() and dist.is_initialized()
        world = num_replicas or (dist.get_world_size() if distributed else 1)
        super().__init__(dataset, world, (dist.get_rank() if distributed else 0) if rank is None else rank)
        episodes = len(dataset)
        whole_shares(dataset, meta_batch_size, world, fixed)
        self.episodes, self.meta_batch_size, self.fixed, self.skip = episodes, meta_batch_size, fixed, 0

    def _share(self, start: int) -> range:
        size = min(self.meta_batch_size, self.episodes - start)
        first, last = (size * rank // self.num_replicas for rank in (self.rank, self.rank + 1))
        return range(start + first, start + last)

    def indices(self, batch: int) -> range:
        """Which episodes are the rank's in a meta-batch of the epoch at hand."""
        offset = 0 if self.fixed else self.epoch * self.episodes
        share = self._share(batch * self.meta_batch_size)
        return range(offset + share.start, offset + share.stop)

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        for batch in range(skip, -(-self.episodes // self.meta_batch_size)):
            yield from self.indices(batch)

    def __len__(self) -> int:
        return sum(len(self._share(start)) for start in range(0, self.episodes, self.meta_batch_size))


class EpisodeLoader(DataLoader[Episode]):
    """A loader that goes on in the middle of an epoch: Lightning keeps its state in each checkpoint.

    It is the meta-batches that training took that count, not those that workers have already drawn.
    """

    given = 0  # meta-batches of this pass
    trainer: Trainer | None = None  # whose limit_train_batches may end an epoch early

    def __iter__(self) -> Iterator[Episode]:  # type: ignore[override]
        # A generator, so that workers begin to draw at the first next(), when Lightning has set the sampler's epoch.
        self.given = cast(EpisodeSampler, self.sampler).skip
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many meta-batches of the epoch were taken; 0 after the last."""
        limit = len(self) if self.trainer is None else min(len(self), int(self.trainer.num_training_batches))
        return {"meta_batches": self.given % limit}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave those out in the next pass."""
        cast(EpisodeSampler, self.sampler).skip = state_dict["meta_batches"]


def _identity(batch: Any) -> Any:
    return batch


class TaskDataModule(LightningDataModule, ABC):
    """Data loaders of episodes; a kind of task adds `make_dataset`.

    Args:
        shots: support examples (per class) ``K``, at least 1.
        query_shots: query examples (per class) ``Q``, at least 1.
        meta_batch_size: episodes per outer step ``T``, over all processes.
        train_episodes: episodes per epoch.
        val_episodes: the same episodes at every validation.
        test_episodes: the same episodes at every test.
        seed: seed of the episodes, any integer.
        num_workers: worker processes per data loader; 0 samples in the main process.

    Attributes:
        score: what is logged of these tasks, ``accuracy`` or ``mse``; the best checkpoint is the best by it.

    Raises:
        SettingError: a number is too small.
    """

    score: Literal["accuracy", "mse"] = "accuracy"

    def __init__(
        self,
        *,
        shots: int,
        query_shots: int,
        meta_batch_size: int,
        train_episodes: int,
        val_episodes: int,
        test_episodes: int,
        seed: int,
        num_workers: int,
    ):
        super().__init__()
        at_least("shots", shots, 1)
        at_least("query_shots", query_shots, 1)
        at_least("meta_batch_size", meta_batch_size, 1)
        at_least("train_episodes", train_episodes, 1)
        at_least("val_episodes", val_episodes, 1)
        at_least("test_episodes", test_episodes, 1)
        at_least("num_workers", num_workers, 0)
        whole_meta_batches(train_episodes, meta_batch_size)
        self.shots, self.query_shots = shots, query_shots
        self.meta_batch_size, self.seed, self.num_workers = meta_batch_size, seed, num_workers
        self.episodes: dict[Split, int] = {"train": train_episodes, "val": val_episodes, "test": test_episodes}
        self.datasets: dict[Split, TaskDataset] = {}

    @abstractmethod
    def make_dataset(self, split: Split) -> TaskDataset:
        """The episodes of a split."""

    def prepare_data(self) -> None:
        """Draw up the datasets before Lightning writes anything: a refused setting leaves nothing behind."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn)
            for split, dataset in self.datasets.items():
                processes = self.trainer.num_devices * self.trainer.num_nodes
                whole_shares(dataset, self.meta_batch_size, processes, self._fixed(split))

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs: ``fit``, ``validate``, ``test``, ``predict``, or None for all."""
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("test",),
        }
        for split in needed.get(stage, ("train", "val", "test")):
            self._dataset(split)

    def train_dataloader(self) -> DataLoader[Episode]:
        """Meta-batches of new episodes at every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Episode]:
        """Meta-batches of the fixed validation episodes."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Episode]:
        """Meta-batches of the fixed test episodes."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Episode]:
        """Meta-batches of the fixed test episodes."""
        return self._loader("test")

    def _fixed(self, split: Split) -> bool:
        """Whether a pass over the split always has the same episodes."""
        return split != "train" or bool(getattr(self.trainer, "overfit_batches", 0))

    def _dataset(self, split: Split) -> TaskDataset:
        if split not in self.datasets:
            self.datasets[split] = self.make_dataset(split)
        return self.datasets[split]

    def _loader(self, split: Split) -> DataLoader[Episode]:
        dataset = self._dataset(split)
        sampler = EpisodeSampler(dataset, self.meta_batch_size, fixed=self._fixed(split))
        settings: dict[str, Any] = {
            "batch_size": self.meta_batch_size // sampler.num_replicas,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "collate_fn": _identity,  # __getitems__ returns the batch as it is
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "generator": torch.Generator(),  # the network's own draws do not depend on how loaders begin
        }
        if split != "train":
            return DataLoader(dataset, **settings)
        loader = EpisodeLoader(dataset, **settings)
        loader.trainer = self.trainer
        return loader


class EpisodicDataModule(TaskDataModule):
    """Data loaders of episodes of images; a data set adds `load_split`.

    Args:
        ways: classes per episode ``N``, at least 2.
        rotations: whether training adds each class turned by 90, 180 and 270 degrees as further classes.
        pretraining: whether training pools the examples of a meta-batch's episodes, labelled among all its classes.
        settings: those of `TaskDataModule`.

    Raises:
        SettingError: a number is too small.
    """

    def __init__(self, *, ways: int, rotations: bool, pretraining: bool = False, **settings: int):
        super().__init__(**settings)
        at_least("ways", ways, 2)
        self.ways, self.rotations, self.pretraining = ways, rotations, pretraining

    @property
    def pretraining_classes(self) -> int:
        """How many classes a network is pre-trained on, the turned ones counted."""
        return cast(EpisodeDataset, self._dataset("train")).classes

    @abstractmethod
    def load_split(self, split: Split) -> Tensor | tuple[Tensor, Sequence[int]]:
        """The images of a split: ``[classes, drawings, (C,) H, W]``, uint8; or ``[n, C, H, W]`` and classes' counts."""

    def groups_of(self, split: Split) -> Sequence[int] | None:
        """A number for each class of a split, where an episode's classes are to be of one group."""
        return None

    def make_dataset(self, split: Split) -> EpisodeDataset:
        """Episodes of the split's images."""
        loaded = self.load_split(split)
        images, counts = (loaded, None) if isinstance(loaded, Tensor) else loaded
        return EpisodeDataset(
            images,
            split,
            self.episodes[split],
            ways=self.ways,
            shots=self.shots,
            query_shots=self.query_shots,
            seed=self.seed,
            rotations=self.rotations and split == "train",
            pretraining=self.pretraining and split == "train",
            counts=counts,
            groups=self.groups_of(split),
        )


def at_least(setting: str, value: int, least: int) -> None:
    """Refuse a setting of the data that is too small.

    Raises:
        SettingError: ``value < least``.
    """
    if not isinstance(value, int) or value < least:
        raise SettingError(f"data.{setting} must be at least {least} (got {value}); raise it.")


def whole_meta_batches(train_episodes: int, meta_batch_size: int) -> None:
    """Refuse an epoch that does not divide into meta-batches.

    Raises:
        SettingError: ``train_episodes`` is no multiple of ``meta_batch_size``.
    """
    if train_episodes % meta_batch_size:
        raise SettingError(
            f"data.train_episodes ({train_episodes}) must be a multiple of data.meta_batch_size ({meta_batch_size}); "
            f"use {train_episodes // meta_batch_size * meta_batch_size + meta_batch_size}."
        )


def whole_shares(dataset: TaskDataset, meta_batch_size: int, processes: int, fixed: bool) -> None:
    """Check that each process can have its share of every meta-batch.

    Args:
        dataset: episodes of a split.
        meta_batch_size: episodes per outer step over all processes.
        processes: their number.
        fixed: whether a pass always has the same episodes, so that its last meta-batch may be smaller.

    Raises:
        SettingError: the meta-batch does not divide by the processes, or (not ``fixed``) the epoch by the meta-batch,
            or there are fewer episodes than processes.
    """
    if meta_batch_size % processes:
        raise SettingError(
            f"data.meta_batch_size ({meta_batch_size}) must be a multiple of the number of processes ({processes}); "
            f"use {meta_batch_size // processes * processes + processes}."
        )
    if not fixed:
        whole_meta_batches(len(dataset), meta_batch_size)
    elif len(dataset) < processes:
        raise SettingError(
            f"data.{dataset.split}_episodes ({len(dataset)}) must be at least the number of processes ({processes}); "
            f"use {processes}."
        )
