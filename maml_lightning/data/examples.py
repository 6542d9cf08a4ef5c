"""The examples of a split, grouped by class: tensors of any type and rank, or tuples and dicts of them."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maml_lightning.errors import SettingError
from maml_lightning.files import shown

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

    def class_of(self, place: int) -> str:
        """What an error calls the class of the example at a place, class after class."""
        return self.name(int(np.searchsorted(np.cumsum(self.counts), place, side="right")))


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """The tree with a function applied to each of its tensors, and to those at the same place of other trees."""
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value, *(other[key] for other in others)) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tree_map(function, *values) for values in zip(tree, *others, strict=True))
    return function(tree, *others)


def leaves(tree: Tree, name: str = "") -> dict[str, Any]:
    """The tensors of a tree by their place in it, such as ``["input_ids"]``."""
    if isinstance(tree, Mapping | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {place: leaf for key, value in items for place, leaf in leaves(value, f"{name}[{key!r}]").items()}
    return {name: tree}


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
        return tree_map(lambda leaf: leaf.index_select(0, rows.flatten()), source)
    tasks: list[Tree] = []
    for task, seed in zip(rows, seeds, strict=True):
        with seeded(seed):
            tasks.append(source(task))
    return tree_map(lambda *values: torch.cat(values), *tasks)


def grouped(labels: Tensor) -> tuple[list[int], list[int], Tensor]:
    """The classes of labels ``[examples]`` in ascending order, how many examples each has, and their rows in order."""
    names, counts = labels.unique(return_counts=True)
    return names.tolist(), counts.tolist(), labels.argsort(stable=True)


def check_finite(examples: Examples, setting: str) -> None:
    """Check that no input and no target is NaN or infinite.

    Raises:
        SettingError: one is; names the class.
    """
    for part in (examples.inputs, examples.targets):
        for place, leaf in leaves(part).items():
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                _check_finite(leaf, place, examples, setting)


def _check_finite(values: Tensor, place: str, examples: Examples, setting: str) -> None:
    total, size = sum(examples.counts), max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, total, size):
        finite = _rows(_some(values, examples.rows, start, start + size)).isfinite().all(1)
        if not finite.all():
            found = start + int((~finite).nonzero()[0])
            row = found if examples.rows is None else int(examples.rows[found])
            raise SettingError(
                f"{setting}{place}: example {row}, of class {examples.class_of(found)}, has a value that is NaN or "
                "infinite; replace the value, or leave the example out."
            )


def content_hashes(examples: Examples) -> list[int]:
    """A hash of each example's input, class after class; the same in this process for the same bytes."""
    total = sum(examples.counts)
    hashed = [
        [
            hash(row.tobytes())
            for start in range(0, total, size)
            for row in _rows(_some(leaf, examples.rows, start, start + size)).contiguous().view(torch.uint8).numpy()
        ]
        for leaf in leaves(examples.inputs).values()
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
