"""Tasks of your own distribution: a function gives one episode, the data module all the rest."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maml_lightning.data.datasets import Split, TaskDataset
from maml_lightning.data.examples import seeded
from maml_lightning.data.modules import TaskDataModule
from maml_lightning.data.random_numbers import random_bits
from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place, mapped, plain

PARTS = Episode._fields


class FunctionDataset(TaskDataset):
    """Episodes that a function gives; batches of them are stacked.

    Args:
        function: of (seed, index), gives one episode: support inputs, support targets, query inputs, query targets.
        split: name of the split; its seed depends on it.
        episodes: the length reported to a ``DataLoader``; any index from 0 is an episode.
        seed: seed of the episodes.
        setting: that gives the function, for errors.
    """

    def __init__(self, function: Callable[[int, int], Any], split: str, episodes: int, *, seed: int, setting: str):
        super().__init__(split, episodes, seed=seed)
        self.function, self.setting = function, setting
        self.split_seed = int(
            random_bits(seed, f"{split} function", [0], 1)[0, 0] >> np.uint64(32)
        )  # as np.random.seed takes

    def __getitems__(self, indices: Sequence[int]) -> Episode:
        """The episodes with these indices as one batch."""
        seeds = random_bits(self.seed, f"{self.split} generators", indices, 1)[:, 0].tolist()
        episodes = [self._episode(index, seed) for index, seed in zip(indices, seeds, strict=True)]
        return Episode(*(self._batch(name, indices, parts) for name, *parts in zip(PARTS, *episodes, strict=True)))

    def _episode(self, index: int, seed: int) -> tuple[Any, ...]:
        with seeded(seed):  # so that what it draws from the global generators depends on (seed, index) as well
            found = self.function(self.split_seed, index)
        if not isinstance(found, tuple) or len(found) != len(PARTS):
            what = f"{len(found)} parts" if isinstance(found, tuple) else type(found).__name__
            raise SettingError(f"{self.setting} gives {what}; give an Episode: {', '.join(PARTS)}.")
        episode = tuple(
            mapped(partial(self._tensor, name, index), plain(part), whole=list)
            for name, part in zip(PARTS, found, strict=True)
        )
        for kind, inputs, targets in (("support", *episode[:2]), ("query", *episode[2:])):
            shapes = [list(leaf.shape) for leaf in (*by_place(inputs).values(), *by_place(targets).values())]
            if [] in shapes or len({shape[0] for shape in shapes}) != 1:
                raise SettingError(
                    f"{self.setting} gives a {kind} set of shapes {', '.join(map(str, shapes))} in episode {index}; "
                    "give one target for each input, both [examples, ...] without a task dimension."
                )
        return episode

    def _tensor(self, name: str, index: int, value: Any) -> Tensor:
        try:
            found = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"{self.setting} gives {name} of {type(value).__name__}; give tensors or arrays of numbers, or "
                "tuples or dicts of them."
            ) from error
        if not found.isfinite().all():
            raise SettingError(
                f"{self.setting} gives {name} with a value that is NaN or infinite in episode {index}; replace it."
            )
        return found

    def _batch(self, name: str, indices: Sequence[int], parts: list[Any]) -> Any:
        kinds = [_kinds(part) for part in parts]
        for index, kind in zip(indices, kinds, strict=True):
            if kind != kinds[0]:
                raise SettingError(
                    f"{self.setting} gives {name} {kinds[0]} in episode {indices[0]} and {kind} in episode {index}; "
                    "give all episodes the same shapes and types."
                )
        return mapped(lambda *values: torch.stack(values), *parts)


def _kinds(tree: Any) -> str:
    kinds = {
        place: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for place, leaf in by_place(tree).items()
    }
    return ", ".join(f"{place} {kind}".strip() for place, kind in kinds.items())


class FunctionDataModule(TaskDataModule):
    """Episodes of your own task distribution: a function of (seed, index) that gives one episode.

    The function gives support inputs, support targets, query inputs and query targets, each an array or a tensor
    ``[examples, ...]``, or a tuple or dict of them. Both numbers are 0 or more; the seed depends on ``seed`` and on the
    split, so that no two splits have the same tasks. What the function draws from
    ``np.random.default_rng([seed, index])``, or from the global generators of PyTorch, NumPy or Python, is the same
    whenever that episode is drawn.

    Args:
        function: the function, or its import path (my_module.my_task); or a class whose instances can be called so.
        val_function: another one for validation; null takes ``function``.
        test_function: another one for the test; null takes ``function``.

    Raises:
        SettingError: a setting is out of range, or the function gives no episodes.
    """

    score = None

    def __init__(
        self,
        function: Callable[[int, int], Any],
        val_function: Callable[[int, int], Any] | None = None,
        test_function: Callable[[int, int], Any] | None = None,
        *,
        meta_batch_size: int = 32,
        train_episodes: int = 3200,
        val_episodes: int = 600,
        test_episodes: int = 1000,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            meta_batch_size=meta_batch_size,
            train_episodes=train_episodes,
            val_episodes=val_episodes,
            test_episodes=test_episodes,
            seed=seed,
            num_workers=num_workers,
        )
        self.shots = self.query_shots = None  # type: ignore[assignment]  # the function alone knows: no report names them
        self.functions: dict[Split, Callable[[int, int], Any] | None] = {
            "train": function,
            "val": val_function,
            "test": test_function,
        }

    def make_dataset(self, split: Split) -> FunctionDataset:
        """The episodes that the function of a split gives."""
        own = self.functions[split]
        setting = "data.function" if own is None or split == "train" else f"data.{split}_function"
        function = own or self.functions["train"]
        if not callable(function):
            raise SettingError(
                f"{setting} is {function!r}, not a function; give one of (seed, index), or its import path."
            )
        return FunctionDataset(function, split, self.episodes[split], seed=self.seed, setting=setting)
