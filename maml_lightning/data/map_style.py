"""Any map-style dataset of labeled examples as episodes: torchvision's, Hugging Face's, your own."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maml_lightning.data.datasets import SPLITS, Split
from maml_lightning.data.examples import Examples, Tree, check_finite, seeded
from maml_lightning.data.modules import EpisodicDataModule, say_what_is_mixed
from maml_lightning.data.pictures import say_what_is_scaled
from maml_lightning.data.reading import Keys, stacked
from maml_lightning.data.splits import check_alike, check_disjoint, check_nothing_shared, split_classes
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place

SHARE_OF_MEMORY = 0.5  # of what is available, that a dataset may take
SPOTS = 16  # examples that are compared with a dataset's list of labels


class OnDemand:
    """Reads examples of a dataset that does not fit into memory; see `maml_lightning.data.examples.Reader`."""

    def __init__(self, dataset: Any, part: Any):
        self.dataset, self.part = dataset, part

    def __call__(self, rows: Tensor) -> Tree:
        """The examples of these rows ``[n]``, each tensor ``[n, ...]``."""
        numbers = rows.tolist()
        found = stacked((self.part(example_of(self.dataset, row)) for row in numbers), len(numbers), numbers)
        for place, leaf in by_place(found).items():
            if not (finite := leaf.isfinite().flatten(1).all(1)).all():
                row = numbers[int((~finite).nonzero()[0])]
                raise SettingError(
                    f"data.dataset{place}: example {row} has a value that is NaN or infinite; replace the value, or "
                    "leave the example out."
                )
        return found


def example_of(dataset: Any, row: int) -> Any:
    """An example of a dataset; its random transforms give the same whenever it is read, and whatever memory is free.

    Raises:
        SettingError: the dataset does not give it.
    """
    if isinstance(dataset, DataLoader):
        raise SettingError("data.dataset is a DataLoader; give the dataset that it loads (its .dataset).")
    try:
        with seeded(row):
            return dataset[row]
    except Exception as error:  # whatever a user's dataset raises
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}".strip()
        raise SettingError(
            f"data.dataset {type(dataset).__name__} does not give example {row} ({reason}); give a map-style dataset "
            "that gives each of its examples by its number, from 0."
        ) from error


class Labeled:
    """A dataset's examples and their labels, in memory if they fit.

    Args:
        dataset: has ``len`` and gives examples by index.
        keys: where their parts are.
        memory: how many bytes it may take.

    Attributes:
        labels: of each example.
        inputs, targets: see `Examples`.
    """

    def __init__(self, dataset: Any, keys: Keys, memory: float):
        try:
            self.size = len(dataset)
        except TypeError as error:
            raise SettingError(
                f"data.dataset {type(dataset).__name__} has no length; give a map-style dataset, no iterable one."
            ) from error
        if not self.size:
            raise SettingError(f"data.dataset {type(dataset).__name__} is empty; give one with examples.")
        first = example_of(dataset, 0)
        parts = [keys.inputs_of(first), *([] if keys.target is None else [keys.target_of(first)])]
        bytes_each = sum(leaf.numel() * leaf.element_size() for part in parts for leaf in by_place(part).values())
        self.in_memory = bytes_each * self.size <= memory
        self.inputs: Any = OnDemand(dataset, keys.inputs_of)
        self.targets: Any = None if keys.target is None else OnDemand(dataset, keys.target_of)
        if self.in_memory:
            self._read(dataset, keys)
            return
        rank_zero_info(
            f"data.dataset: {self.size} examples of {bytes_each} bytes do not fit into memory; they are read when "
            "they are drawn."
        )
        known = _known_labels(dataset, keys, self.size)
        self.labels = known or [plain(keys.label_of(example_of(dataset, row))) for row in range(self.size)]

    def _read(self, dataset: Any, keys: Keys) -> None:
        """Read inputs and targets of all examples as one, and the labels on the way."""
        self.labels = []

        def parts() -> Iterator[dict[str, Tree]]:
            for row in range(self.size):
                example = example_of(dataset, row)
                self.labels.append(plain(keys.label_of(example)))
                target = {} if keys.target is None else {"target": keys.target_of(example)}
                yield {"inputs": keys.inputs_of(example), **target}

        whole = stacked(parts(), self.size, range(self.size))
        self.inputs, self.targets = whole["inputs"], whole.get("target")

    def examples(self, classes: Sequence[Any]) -> Examples:
        """The examples of some classes."""
        place = {name: index for index, name in enumerate(classes)}
        numbers = torch.tensor([place.get(label, -1) for label in self.labels])
        rows = (numbers >= 0).nonzero()[:, 0]
        rows = rows[numbers[rows].argsort(stable=True)]
        counts = torch.bincount(numbers[rows], minlength=len(classes)).tolist()
        return Examples(self.inputs, counts, list(classes), rows, self.targets)


def plain(label: Any) -> int | str:
    """A label as a number or a text.

    Raises:
        SettingError: it is neither, or a negative number.
    """
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool) and label >= 0):
        return label
    raise SettingError(f"data.label: the dataset has the label {str(label)[:50]!r}; give integers from 0, or names.")


def _known_labels(dataset: Any, keys: Keys, size: int) -> list[int | str] | None:
    """The labels that a dataset lists (torchvision's ``targets``, a column of Hugging Face's), if examples agree."""
    columns = getattr(dataset, "column_names", ())
    name = keys.label or "label"
    try:
        found = dataset[name] if name in columns else dataset.targets
        labels = [plain(label) for label in found]
    except (AttributeError, KeyError, TypeError, SettingError):
        return None
    spots = range(0, size, max(1, size // SPOTS))
    agree = len(labels) == size and all(plain(keys.label_of(example_of(dataset, row))) == labels[row] for row in spots)
    return labels if agree else None


class DatasetDataModule(EpisodicDataModule):
    """Episodes of any map-style dataset: one of torchvision, a Hugging Face dataset with_format("torch"), or your own.

    An example is a tuple ``(input, label)``, or with several inputs ``(input, input, ..., label)``; or a dict. Labels
    are integers or names. Pictures, as uint8 tensors too, are scaled to [0, 1], other inputs stay as they are.

    The dataset is kept in memory if it fits into half of what is available; else examples are read when they are drawn.
    Its random transforms give each example once and for all; ``augmentation`` draws anew for each training episode.

    Args:
        dataset: of all classes, which are split; or of the training classes, if there are others for the rest.
        val_dataset: of the validation classes, if ``dataset`` has the training classes alone.
        test_dataset: of the test classes, if ``dataset`` has the training classes alone.
        classes: the labels of each split, ``{train: [...], val: [...], test: [...]}``; null draws 64, 16 and 20 %.
        split_seed: draws which classes are for training, validation and test.
        inputs: places in the tuple or keys of the dict that are inputs; null takes all but label and target.
        label: place or key of the label; null takes the last of a tuple, ``label`` or ``labels`` of a dict.
        target: place or key of what is to be predicted in place of the class (numbers, several labels, pixels).
        ways: classes per episode ``N``, at least 2. With a target, at least 1.

    Raises:
        SettingError: a setting is out of range, or a dataset cannot be used.
    """

    least_ways = 1
    score = None

    def __init__(
        self,
        dataset: Dataset,
        val_dataset: Dataset | None = None,
        test_dataset: Dataset | None = None,
        *,
        classes: dict[str, list[int | str]] | None = None,
        split_seed: int = 0,
        inputs: list[int | str] | None = None,
        label: int | str | None = None,
        target: int | str | None = None,
        ways: int = 5,
        **settings: Any,
    ):
        super().__init__(ways=ways, **settings)
        if (val_dataset is None) != (test_dataset is None):
            given, missing = ("val", "test") if test_dataset is None else ("test", "val")
            raise SettingError(
                f"data.{given}_dataset is given, but not data.{missing}_dataset; give both, or neither, which splits "
                "the classes of data.dataset."
            )
        if classes is not None and (val_dataset is not None or set(classes) != set(SPLITS)):
            reason = (
                "but the splits have datasets of their own" if val_dataset is not None else "not train, val and test"
            )
            raise SettingError(
                f"data.classes has {', '.join(classes)}, {reason}; give the classes of each split, or none."
            )
        self.given: dict[Split, Any] = {"train": dataset, "val": val_dataset, "test": test_dataset}
        self.classes, self.split_seed, self.keys = classes, split_seed, Keys(inputs, label, target)
        if target is not None:
            self.ways = None  # the targets' classes, if they are any, have nothing to do with it
        self._read: dict[Split, Labeled] = {}
        self._loaded: dict[Split, Examples] = {}

    def _labeled(self, split: Split) -> Labeled:
        source: Split = "train" if self.given["val"] is None else split
        if source not in self._read:
            memory = SHARE_OF_MEMORY * psutil.virtual_memory().available / getattr(self.trainer, "num_devices", 1)
            self._read[source] = Labeled(self.given[source], self.keys, memory)
        return self._read[source]

    def classes_of(self, split: Split) -> list[Any]:
        """The labels of a split's classes."""
        there = sorted(set(self._labeled(split).labels), key=lambda label: (isinstance(label, str), label))
        if self.given["val"] is not None:
            return there
        if self.classes is None:
            return split_classes(there, self.split_seed)[split]
        if len(set(self.classes[split])) < len(self.classes[split]):
            name = max(self.classes[split], key=self.classes[split].count)
            raise SettingError(f"data.classes has class {name} twice in {split}; leave one.")
        if missing := [label for label in self.classes[split] if label not in there]:
            raise SettingError(
                f"data.classes has class {missing[0]} in {split}, but the dataset has no example of it; remove it."
            )
        return self.classes[split]

    def load_split(self, split: Split) -> Examples:
        """The examples of a split, checked alone and against those that were loaded before."""
        if split not in self._loaded:
            labeled = self._labeled(split)
            if self.keys.target is not None:
                say_what_is_mixed("data.dataset", self._drawn, self._loaded)
            self._loaded[split] = examples = labeled.examples(self.classes_of(split))
            if labeled.in_memory:
                if len(self._loaded) == 1:
                    say_what_is_scaled("data.dataset", examples.inputs)
                check_finite(examples, f"data.dataset ({split})")
            names: Mapping[Any, Sequence[Any]] = self.classes or {
                name: found.names or [] for name, found in self._loaded.items()
            }
            check_disjoint({f"data.dataset ({name})": found for name, found in names.items()})
            known = {name: found for name, found in self.loaded().items() if not callable(found.inputs)}
            check_alike(known)
            for first, second in combinations(known, 2):
                if f"data.dataset ({split})" in (first, second):
                    check_nothing_shared(first, known[first], second, known[second])
        return self._loaded[split]

    def loaded(self) -> dict[str, Examples]:
        """The examples of the splits that were loaded, by what errors call them."""
        return {f"data.dataset ({split})": examples for split, examples in self._loaded.items()}
