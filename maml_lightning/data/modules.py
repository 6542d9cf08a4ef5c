"""What data modules of episodes share: their settings, described once, and their data loaders."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from maml_lightning.data.checks import at_least, whole_meta_batches, whole_shares
from maml_lightning.data.datasets import SPLITS, EpisodeDataset, Layout, Split, TaskDataset, images
from maml_lightning.data.examples import Examples, extremes
from maml_lightning.data.inherited_settings import full_docstring, full_signature
from maml_lightning.data.loading import EpisodeLoader, EpisodeSampler, TaskLoader
from maml_lightning.data.pictures import Preparation
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError


class TaskDataModule(LightningDataModule, ABC):
    """Data loaders of episodes; a kind of task adds `make_dataset`.

    A subclass's ``__init__`` takes its own settings and ``**settings``, which it passes on. To give a shared setting
    another default, it names that one too. Help, signature and docstring then show them all.

    Args:
        shots: support examples per class ``K``, at least 1.
        query_shots: query examples per class ``Q``, at least 1.
        meta_batch_size: episodes per outer step ``T``, over all processes.
        train_episodes: episodes per epoch, a multiple of ``meta_batch_size``.
        val_episodes: episodes per validation, always the same.
        test_episodes: episodes per test, always the same.
        seed: seed of the episodes, any integer; classes and splits do not depend on it.
        num_workers: worker processes per data loader; 0 samples in the main process.

    Attributes:
        score: what is logged of these tasks, ``accuracy`` or ``mse``; the best checkpoint is the best by it. None where
            that depends on their targets.

    Raises:
        SettingError: a setting is out of range.
    """

    score: Literal["accuracy", "mse"] | None = "accuracy"

    def __init__(
        self,
        *,
        shots: int = 1,
        query_shots: int = 1,
        meta_batch_size: int = 32,
        train_episodes: int = 3200,
        val_episodes: int = 600,
        test_episodes: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = full_signature(cls)  # type: ignore[attr-defined]
        cls.__doc__ = full_docstring(cls)

    @abstractmethod
    def make_dataset(self, split: Split) -> TaskDataset:
        """The episodes of a split."""

    def prepare_data(self) -> None:
        """Make the datasets before Lightning writes anything, so that a setting out of range leaves no files."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn)
            for split, dataset in self.datasets.items():
                processes = self.trainer.num_devices * self.trainer.num_nodes
                whole_shares(dataset.split, len(dataset), self.meta_batch_size, processes, self._fixed(split))

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs: ``fit``, ``validate``, ``test``, ``predict``, or None for all."""
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("test",),
        }
        without_validation = self.trainer is not None and self.trainer.limit_val_batches == 0
        for split in needed.get(stage, SPLITS):
            if split != "val" or stage != "fit" or not without_validation:
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

    def _is_on_cuda(self) -> bool:
        """Whether the trainer runs on a GPU, whose copies overlap with its work where a batch's memory is pinned."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _fixed(self, split: Split) -> bool:
        """Whether every epoch has the same episodes of the split."""
        return split != "train" or bool(getattr(self.trainer, "overfit_batches", 0))

    def _dataset(self, split: Split) -> TaskDataset:
        if split not in self.datasets:
            self.datasets[split] = self.make_dataset(split)
        return self.datasets[split]

    def _loader(self, split: Split) -> DataLoader[Episode]:
        dataset = self._dataset(split)
        sampler = EpisodeSampler(dataset, self.meta_batch_size, fixed=self._fixed(split))
        options: dict[str, Any] = {
            "batch_size": self.meta_batch_size // sampler.num_replicas,
            "sampler": sampler,
            "num_workers": self.num_workers,
            "collate_fn": _identity,  # __getitems__ returns the batch as it is
            "pin_memory": self._is_on_cuda(),
            "persistent_workers": self.num_workers > 0,
            "generator": torch.Generator(),  # so that starting a loader draws nothing from torch's global generator
        }
        if split != "train":
            return TaskLoader(dataset, **options)
        loader = EpisodeLoader(dataset, **options)
        loader.trainer = self.trainer
        return loader


class EpisodicDataModule(TaskDataModule):
    """Data loaders of episodes of classified examples; a data set adds `load_split`.

    Args:
        rotations: whether training adds each class rotated by 90, 180 and 270 degrees as further classes.
        eval_rotations: whether each validation and test episode rotates each class by a random multiple of 90 degrees,
            as the code of MAML's authors does (Finn et al. 2017); easier with many ways.
        pretraining: train on all training classes at once, the examples of a meta-batch pooled, for a network
            with that many outputs in training and ``inner_steps`` 0 (ordinary pretraining, the baseline).
        ways: classes per episode ``N``, at least 2.
        mean: subtracted from each channel of pictures ``[C, H, W]`` in [0, 1]: one value or one for each channel.
        std: by which each channel is divided then.
        query_layout: balanced gives each class query_shots queries; random draws the class of each of the N*Q queries
            of an episode, each class equally likely while it has examples left.
        augmentation: transforms of each training picture, such as torchvision.transforms.v2.RandomHorizontalFlip, by
            class path; they receive uint8 pictures. Their random numbers depend on the episode alone.

    Raises:
        SettingError: a setting is out of range.
    """

    least_ways = 2  # 1 where examples may have targets of their own

    def __init__(
        self,
        *,
        rotations: bool = False,
        eval_rotations: bool = False,
        pretraining: bool = False,
        ways: int = 5,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        augmentation: list[Callable] | None = None,
        query_layout: Layout = "balanced",
        **settings: int,
    ):
        super().__init__(**settings)
        at_least("ways", ways, self.least_ways)
        if query_layout not in get_args(Layout):
            raise SettingError(f"data.query_layout must be balanced or random (got {query_layout}).")
        self.ways: int | None = ways
        self.query_layout = query_layout
        self._drawn, self.rotations, self.pretraining = ways, rotations, pretraining
        self.eval_rotations = eval_rotations
        if not isinstance(augmentation, list | tuple | None):
            name = type(augmentation).__name__
            raise SettingError(f"data.augmentation must be a list of transforms (got {name}); put it into a list.")
        self.pictures = Preparation(_values(mean), _values(std), augmentation or ())

    @property
    def pretraining_classes(self) -> int:
        """How many classes a network is pretrained on, including the rotated ones."""
        return cast(EpisodeDataset, self._dataset("train")).classes

    @abstractmethod
    def load_split(self, split: Split) -> Tensor | tuple[Tensor, Sequence[int]] | Examples:
        """The examples of a split.

        Returns:
            images ``[classes, examples, (C,) H, W]``, uint8; or images ``[n, C, H, W]`` and how many each class has; or
            `Examples`, whose inputs may have any type and shape.
        """

    def groups_of(self, split: Split) -> Sequence[int] | None:
        """A group number for each class of a split, if all classes of an episode must be of one group."""
        return None

    def make_dataset(self, split: Split) -> EpisodeDataset:
        """Episodes of the split's examples."""
        training = split == "train"
        return EpisodeDataset(
            self._examples(split),
            split,
            self.episodes[split],
            ways=self._drawn,
            shots=self.shots,
            query_shots=self.query_shots,
            seed=self.seed,
            rotations=self.rotations if training else self.eval_rotations and "drawn",
            pretraining=self.pretraining and training,
            groups=self.groups_of(split),
            pictures=self.pictures if training else self.pictures._replace(augmentation=()),
            query_layout=self.query_layout,
        )

    @property
    def normalization(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """The mean and the standard deviation that pictures are normalized with; None for none."""
        return self.pictures.mean, self.pictures.std

    def loaded(self) -> dict[str, Examples]:
        """The examples of the splits that were loaded, by what errors call them."""
        datasets = {f"The {split} split": dataset for split, dataset in self.datasets.items()}
        return {name: found.examples for name, found in datasets.items() if isinstance(found, EpisodeDataset)}

    def extremes(self) -> Iterator[tuple[str, Episode]]:
        """Episodes with the least and the greatest numbers of each split, and what errors call the example with each.

        A network or a loss may not take them, whatever it does with the first episode.
        """
        dataset = next(iter(self.datasets.values()), None)
        if isinstance(dataset, EpisodeDataset):
            for setting, examples in self.loaded().items():
                for what, row in extremes(examples, setting):
                    yield what, dataset.with_example(examples, row)

    def _examples(self, split: Split) -> Examples:
        loaded = self.load_split(split)
        if isinstance(loaded, Examples):
            return loaded
        pixels, counts = (loaded, None) if isinstance(loaded, Tensor) else loaded
        if pixels.dtype != torch.uint8 or pixels.ndim not in ((4, 5) if counts is None else (4,)):
            raise SettingError(
                f"{type(self).__name__}.load_split gives {pixels.dtype} {list(pixels.shape)}; give uint8 (0 to 255) "
                "images [classes, examples, (C,) H, W], or [n, C, H, W] and the number of each class's, or "
                "maml_lightning.data.Examples, which may have any type."
            )
        return images(pixels, counts)


def say_what_is_mixed(setting: str, ways: int, loaded: Collection[Any]) -> None:
    """Print, before a first split is loaded, that each episode of examples with targets is of several tasks."""
    if ways > 1 and not loaded:
        rank_zero_info(
            f"{setting} has targets: each episode mixes the examples of {ways} tasks (data.ways); data.ways 1 adapts "
            "to one task at a time."
        )


def _values(given: float | list[float] | None) -> list[float] | None:
    return [given] if isinstance(given, int | float) else given


def _identity(batch: Any) -> Any:
    return batch
