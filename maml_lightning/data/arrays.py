"""Arrays and tensors of any type and shape as classes: from Python, or from files."""

import hashlib
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from maml_lightning.data.array_files import FORMS, examples_of
from maml_lightning.data.datasets import SPLITS, Split
from maml_lightning.data.examples import Examples, take
from maml_lightning.data.modules import EpisodicDataModule, say_what_is_mixed
from maml_lightning.data.pictures import say_what_is_scaled
from maml_lightning.data.splits import check_alike, check_disjoint, check_nothing_shared
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place

SAMPLE = 64  # examples that stand for all, to see whether a resumed run's data are the same


class ArraysDataModule(EpisodicDataModule):
    """Episodes of arrays or tensors of any type and shape, from Python or from files.

    Each split is an array ``[classes, examples, ...]``, or a list of one array ``[examples, ...]`` for each class; or
    ``(inputs, labels)``: inputs ``[examples, ...]`` and integer labels ``[examples]``. Several inputs are a tuple or a
    dict of arrays. By name it is a dict, or a file, with ``inputs`` and ``labels``; in place of ``inputs`` there may be
    several inputs by their names, such as ``input_ids`` and ``attention_mask``. ``targets`` beside them are what is to
    be predicted of each example (numbers, several labels, labels of pixels) in place of its class; labels then say
    which task an example is of. Files are ``.npz``, ``.npy``, or ``.pt`` of tensors; no code in them is run.

    Inputs ``[H, W]`` or ``[C, H, W]`` of type uint8 are pictures: they are scaled to [0, 1], and gray ones get their
    channel. All other inputs stay as they are. No class may be in two splits: a label is the same class in all splits,
    unless each split numbers its own classes from 0 without a gap, and has another number of them.

    Args:
        train: training classes: a file (.npz, .npy, .pt) with inputs and integer labels, or with one array
            [classes, examples, ...]; from Python also the arrays themselves.
        val: validation classes, likewise.
        test: test classes, likewise.
        ways: classes per episode ``N``, at least 2. With targets, tasks per episode, at least 1.

    Raises:
        SettingError: a setting is out of range, or a split cannot be used.
    """

    least_ways = 1
    score = None

    def __init__(self, train: Any = None, val: Any = None, test: Any = None, *, ways: int = 5, **settings: Any):
        super().__init__(ways=ways, **settings)
        self.given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        self._loaded: dict[Split, Examples] = {}
        self._labels: dict[Split, set[int] | None] = {}
        self._trained_on: str | None = None  # by a run that is resumed

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the stage needs; before training check all that are given."""
        if stage in (None, "fit"):
            for split in SPLITS:
                if self.given[split] is not None:
                    self.load_split(split)
        super().setup(stage)

    def load_split(self, split: Split) -> Examples:
        """The examples of a split, checked alone and against those that were loaded before."""
        if split not in self._loaded:
            setting, given = f"data.{split}", self.given[split]
            if given is None:
                raise SettingError(f"{setting} is not given; give {FORMS}.")
            examples, self._labels[split] = examples_of(given, setting)
            if examples.targets is not None:
                self.ways = None  # the targets' classes, if they are any, have nothing to do with it
                say_what_is_mixed(setting, self._drawn, self._loaded)
            if not self._loaded:
                say_what_is_scaled(setting, examples.inputs)
            self._loaded[split] = examples
            self._check_alike()
            for first, second in combinations(self._loaded, 2):
                if split in (first, second):
                    self._check_disjoint(first, second)
        return self._loaded[split]

    def _check_alike(self) -> None:
        try:
            check_alike(self.loaded())
        except SettingError as error:
            for split, labels in self._labels.items():
                if labels is None and any(self._labels.values()):
                    reason = f"data.{split} has no labels, so that it is read as [classes, examples, ...]"
                    raise SettingError(f"{reason}: {error}") from error
            raise

    def loaded(self) -> dict[str, Examples]:
        """The examples of the splits that were loaded, by what errors call them."""
        return {f"data.{split}": examples for split, examples in self._loaded.items()}

    def _check_disjoint(self, first: Split, second: Split) -> None:
        settings = f"data.{first}", f"data.{second}"
        check_nothing_shared(settings[0], self._loaded[first], settings[1], self._loaded[second])
        labels = (sorted(self._labels[split] or ()) for split in (first, second))
        check_disjoint(dict(zip(settings, labels, strict=True)), numbered_alone=True)

    def state_dict(self) -> dict[str, Any]:
        """What tells the training data apart from others."""
        return {"train": fingerprint(self._loaded["train"])} if "train" in self._loaded else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say if a resumed run continues on other data: arrays given from Python are in no config."""
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and "train" in state_dict and fingerprint(self.load_split("train")) != state_dict["train"]:
            rank_zero_warn(
                "data.train holds other examples than the resumed run was trained on; training continues on these."
            )


def fingerprint(examples: Examples) -> str:
    """A text that differs for other examples: sizes, types, and a checksum of some."""
    total = sum(examples.counts)
    rows = torch.linspace(0, total - 1, min(total, SAMPLE)).long()
    if examples.rows is not None:
        rows = examples.rows[rows]
    some = by_place(take(examples.inputs, rows[None], [0]))
    kinds = {place: f"{leaf.dtype}{list(leaf.shape[1:])}" for place, leaf in some.items()}
    return f"{_checksum(some.values())} {len(examples.counts)} classes {total} examples {kinds}"


def _checksum(tensors: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for leaf in tensors:
        digest.update(leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
