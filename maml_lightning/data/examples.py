"""The examples of a split, grouped by class: tensors of any type and rank, or tuples and dicts of them."""

import contextlib
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.structures import by_place, mapped

Tree = Any  # a tensor, or a tuple or dict of trees
Reader = Callable[[Tensor], Tree]  # the examples of some rows [n], each tensor [n, ...]

CHUNK = 2**24  # values that are checked at once


class Examples(NamedTuple):
    """The examples of one split, class after class.

    Args:
        inputs: each tensor ``[examples, ...]``; or a function that reads rows ``[n]``, each tensor ``[n, ...]``.
        counts: how many examples each class has.
        names: what errors call each class; None numbers them.
        rows: the row of each example, where ``inputs`` has them in another order.
        targets: what is to be predicted, as ``inputs``; None predicts the class, with labels drawn anew per episode.
    """

    inputs: Tree | Reader
    counts: Sequence[int]
    names: Sequence[object] | None = None
    rows: Tensor | None = None
    targets: Tree | Reader | None = None

    def name(self, index: int) -> str:
        """What an error calls a class."""
        return shown(index if self.names is None else self.names[index])

    def row(self, place: int) -> int:
        """The row of the example at a place, class after class."""
        return place if self.rows is None else int(self.rows[place])

    def at(self, place: int) -> str:
        """What an error calls the example at a place, class after class."""
        index = int(np.searchsorted(np.cumsum(self.counts), place, side="right"))
        return f"example {self.row(place)}, of class {self.name(index)}"


def is_of_pictures(leaf: Tensor) -> bool:
    """Whether examples ``[examples, ...]`` are pictures: uint8 ``[(C,) H, W]``, or more; not the bytes of a vector."""
    return leaf.dtype == torch.uint8 and leaf.ndim > 2


def take(source: Tree | Reader, rows: Tensor, seeds: Sequence[int]) -> Tree:
    """The examples of these rows.

    Args:
        source: each tensor ``[examples, ...]``; or a function that reads rows.
        rows: of each task, ``[T, n]``.
        seeds: of each task, ``[T]``, for random numbers in what is read: inputs and targets are read with the same.

    Returns:
        each tensor ``[T * n, ...]``.
    """
    if not callable(source):
        return mapped(lambda leaf: leaf.index_select(0, rows.flatten()), source)
    tasks: list[Tree] = []
    for task, seed in zip(rows, seeds, strict=True):
        with seeded(seed):
            tasks.append(source(task))
    return mapped(lambda *values: torch.cat(values), *tasks)


def grouped(labels: Tensor) -> tuple[list[int], list[int], Tensor]:
    """The classes of labels ``[examples]`` in ascending order, how many examples each has, and their rows in order."""
    names, counts = labels.unique(return_counts=True)
    return names.tolist(), counts.tolist(), labels.argsort(stable=True)


def tensors_of(examples: Examples) -> dict[str, Tensor]:
    """The tensors of inputs and targets that are in memory, by what an error adds to the setting that gives them."""
    parts = {"": examples.inputs, " targets": examples.targets}
    found = {part + place: leaf for part, tree in parts.items() for place, leaf in by_place(tree).items()}
    return {place: leaf for place, leaf in found.items() if isinstance(leaf, Tensor)}


def check_finite(examples: Examples, setting: str) -> None:
    """Check that no input and no target is NaN or infinite.

    Raises:
        SettingError: one is; names the class.
    """
    for place, leaf in tensors_of(examples).items():
        if leaf.is_floating_point() or leaf.is_complex():
            _check_finite(leaf, place, examples, setting)


def _check_finite(values: Tensor, place: str, examples: Examples, setting: str) -> None:
    total, size = sum(examples.counts), max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, total, size):
        finite = _rows(_some(values, examples.rows, start, start + size)).isfinite().all(1)
        if not finite.all():
            found = start + int((~finite).nonzero()[0])
            raise SettingError(
                f"{setting}{place}: {examples.at(found)}, has a value that is NaN or "
                "infinite; replace the value, or leave the example out."
            )


def extremes(examples: Examples, setting: str) -> Iterator[tuple[str, int]]:
    """Examples that hold the two least and the two greatest numbers of a tensor: two, because one may be ignored.

    Only numbers that a network or a loss may not take are looked at: integers, such as token ids, and targets.

    Args:
        examples: of one split.
        setting: that gives them, for errors.

    Returns:
        what an error calls each, and its row.
    """
    for place, leaf in tensors_of(examples).items():
        if not place.startswith(" targets") and (leaf.is_floating_point() or is_of_pictures(leaf)):
            continue
        if leaf.dtype == torch.bool or leaf.is_complex() or not leaf.numel():
            continue
        found = _ends(leaf, examples)
        for value in sorted({*sorted(found)[:2], *sorted(found)[-2:]}):
            row = examples.row(found[value])
            least, greatest = _comparable(leaf[row]).aminmax()
            yield f"{setting}{place}: {examples.at(found[value])}, has {least:g} to {greatest:g}", row


def _comparable(values: Tensor) -> Tensor:
    """The values as a type that has a minimum: uint16 has none."""
    return values.double() if values.is_floating_point() else values.long()


def _ends(values: Tensor, examples: Examples) -> dict[float, int]:
    """Some numbers of a tensor, the two least and the two greatest among them, and the place of an example of each."""
    total, size = sum(examples.counts), max(1, CHUNK // math.prod(values.shape[1:]))
    found: dict[float, int] = {}
    for start in range(0, total, size):
        some = _comparable(_rows(_some(values, examples.rows, start, start + size)))
        least, greatest = some.aminmax()
        between = some[(some != least) & (some != greatest)]
        for value in (least, greatest, *(between.aminmax() if between.numel() else ())):
            if value.item() not in found:
                found[value.item()] = start + int((some == value).any(1).nonzero()[0])
    return found


def content_hashes(examples: Examples, places: Collection[str] = ()) -> list[int]:
    """A hash of each example's input, class after class; the same in this process for the same bytes.

    Args:
        examples: of one split.
        places: of the tensors of their inputs that count; none counts all.
    """
    total = sum(examples.counts)
    hashed = [
        [
            hash(row.tobytes())
            for start in range(0, total, size)
            for row in _rows(_some(leaf, examples.rows, start, start + size)).contiguous().view(torch.uint8).numpy()
        ]
        for place, leaf in by_place(examples.inputs).items()
        if not places or place in places
        for size in (max(1, CHUNK // max(1, math.prod(leaf.shape[1:]))),)
    ]
    return [hash(parts) for parts in zip(*hashed, strict=True)]


def _some(values: Tensor, rows: Tensor | None, first: int, last: int) -> Tensor:
    return values[first:last] if rows is None else values.index_select(0, rows[first:last])


def _rows(values: Tensor) -> Tensor:
    """Values ``[n, ...]`` as ``[n, m]``."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of PyTorch (CPU), NumPy and Python; restore their states afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
