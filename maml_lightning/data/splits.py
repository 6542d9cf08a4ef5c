"""Which classes are for training, validation and test, and whether splits have anything in common."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maml_lightning.data.datasets import Split
from maml_lightning.data.examples import Examples, content_hashes, is_of_pictures, tensors_of
from maml_lightning.data.random_numbers import choose, random_bits
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.structures import by_place

SHARES: dict[Split, float] = {"train": 0.64, "val": 0.16, "test": 0.2}  # of the classes; mini-ImageNet's proportions

Name = TypeVar("Name", bound=Any)


def split_classes(names: Sequence[Name], seed: int) -> dict[Split, list[Name]]:
    """Disjoint classes of each split, 64, 16 and 20 %, by a permutation that the seed draws."""
    order = choose(random_bits(seed, "classes", [0], 2 * len(names)), len(names))[0]
    ends = np.round(np.cumsum([0, *SHARES.values()]) * len(names)).astype(int)
    return {
        split: sorted(names[index] for index in order[first:last])
        for split, first, last in zip(SHARES, ends[:-1], ends[1:], strict=True)
    }


def check_disjoint(classes: Mapping[str, Sequence[Any]], *, numbered_alone: bool = False) -> None:
    """Check that no class is in two splits.

    Args:
        classes: numbers or names of each setting's classes; errors name the setting.
        numbered_alone: whether classes of two splits that both are numbered from 0 without a gap, up to different
            numbers, are different ones; it is said.

    Raises:
        SettingError: one is.
    """
    for first, second in combinations(classes, 2):
        both = sorted(set(classes[first]) & set(classes[second]), key=str)
        numbered = numbered_alone and all(_numbered(classes[setting]) for setting in (first, second))
        if both and numbered and len(classes[first]) != len(classes[second]):
            rank_zero_info(f"{first} and {second} each number their classes from 0; they count as different classes.")
        elif both:
            more = f" and {len(both) - 1} more" if both[1:] else ""
            remedy = "split by class, or number them differently if they are different ones" if numbered else ""
            raise SettingError(
                f"{first} and {second} share class {shown(both[0])}{more}; a class must be in one split alone: "
                f"{remedy or 'remove it from one'}."
            )


def _numbered(names: Sequence[Any]) -> bool:
    return {str(name) for name in names} == {str(number) for number in range(len(names))}


def check_alike(splits: Mapping[str, Examples]) -> None:
    """Check that the inputs and the targets of all splits have the same structure, types and shapes.

    Args:
        splits: the examples of each setting.

    Raises:
        SettingError: they have not.
    """
    kinds = {
        setting: {
            place: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape[1:])}"
            for place, leaf in tensors_of(examples).items()
        }
        for setting, examples in splits.items()
    }
    first = next(iter(kinds), "")
    for setting, kind in kinds.items():
        for place in sorted({*kind, *kinds[first]}):
            ours, theirs = kind.get(place, "missing"), kinds[first].get(place, "missing")
            if ours != theirs:
                where, what = ("", place.strip()) if place.startswith(" targets") else (place, "examples")
                raise SettingError(
                    f"{setting}{where} has {what} {ours}, but those of {first}{where} are {theirs}; give all splits "
                    "the same type and shape."
                )


def _shows(leaf: Tensor) -> bool:
    """Whether examples ``[examples, ...]`` are pictures, of any type."""
    return is_of_pictures(leaf) or (leaf.is_floating_point() and leaf.ndim == 4 and leaf.shape[1] in (1, 3))


def check_nothing_shared(first: str, ours: Examples, second: str, theirs: Examples) -> None:
    """Check that two splits have no class in common, and no picture.

    Pictures (uint8, or floats ``[1 or 3, H, W]``) must differ one by one. Other examples, such as rows of yes and no,
    may be alike by chance: there no class may have all of its examples in the other split.

    Raises:
        SettingError: they have.
    """
    seen = {place for place, leaf in by_place(theirs.inputs).items() if _shows(leaf)}
    pictures = bool(seen)
    known = set(content_hashes(ours, seen))
    hashes, start = content_hashes(theirs, seen), 0
    for index, count in enumerate(theirs.counts):
        found = [place for place in range(start, start + count) if hashes[place] in known]
        start += count
        if count and len(found) == count:
            raise SettingError(
                f"{first} and {second} share a class: all examples of class {theirs.name(index)} of {second} are in "
                f"{first} too; remove it from one."
            )
        if pictures and found:
            row = found[0] if theirs.rows is None else int(theirs.rows[found[0]])
            raise SettingError(
                f"{first} and {second} share a picture: example {row} of {second}, of class {theirs.name(index)}, "
                f"is in {first} too; remove it from one."
            )
