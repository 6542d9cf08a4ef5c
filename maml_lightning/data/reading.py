"""Examples of a map-style dataset as tensors: where their parts are, and many as one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maml_lightning.data.examples import Tree
from maml_lightning.data.image_files import DecodeError, eight_bit
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place, mapped


class Keys:
    """Where an example's inputs, label and targets are: places of a tuple, or keys of a dict.

    Args:
        inputs: None takes all but label and target; one gives that input itself, several a dict (of a tuple, a tuple).
        label: None takes the last of a tuple; ``label`` or ``labels`` of a dict.
        target: of what is to be predicted; None predicts the class.
    """

    def __init__(self, inputs: Sequence[Any] | None, label: Any, target: Any):
        self.inputs, self.label, self.target = inputs, label, target

    def label_of(self, example: Any) -> Any:
        """The label of an example, as the dataset gives it."""
        return self._get(example, self._label(example), "label")

    def inputs_of(self, example: Any) -> Tree:
        """The inputs of an example, as tensors."""
        others = (self._label(example), self.target)
        if self.inputs is not None:
            keys = list(self.inputs)
        elif isinstance(example, Mapping):
            keys = [key for key in example if key not in others]
        else:  # places may count from the end
            keys = [place for place in range(len(example)) if not {place, place - len(example)} & {*others}]
        found = {key: mapped(_gray, as_tensors(self._get(example, key, "inputs"), key)) for key in keys}
        if len(found) == 1:
            return next(iter(found.values()))
        return found if isinstance(example, Mapping) else tuple(found.values())

    def target_of(self, example: Any) -> Tree:
        """The target of an example, as tensors."""
        return mapped(_target, as_tensors(self._get(example, self.target, "target"), self.target))

    def _label(self, example: Any) -> Any:
        if not isinstance(example, Mapping | tuple | list):
            raise SettingError(
                f"data.dataset gives examples of {type(example).__name__}; give tuples (input, label), or dicts."
            )
        if self.label is not None:
            return self.label
        if isinstance(example, Mapping):
            return "labels" if "labels" in example and "label" not in example else "label"
        return -1

    def _get(self, example: Any, key: Any, setting: str) -> Any:
        try:
            return example[key]
        except (KeyError, IndexError, TypeError) as error:
            there = list(example) if isinstance(example, Mapping) else list(range(len(example)))
            raise SettingError(
                f"data.{setting} {key} is not in the dataset's examples, which have {', '.join(map(str, there))}; give "
                "one of these."
            ) from error


def as_tensors(value: Any, key: Any = "") -> Tree:
    """Numbers, arrays, pictures and lists of numbers as tensors; tuples and dicts of them as such.

    Args:
        value: of one example. A picture becomes uint8 ``[C, H, W]``, as `eight_bit` says.
        key: what it is called in the example, for errors.

    Raises:
        SettingError: it is something else.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Image.Image):
        try:
            picture = eight_bit(value)
        except DecodeError as error:
            raise SettingError(f"A picture of the dataset's examples {error}, or leave it out.") from error
        pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    if isinstance(value, Mapping):
        return {name: as_tensors(each, f"{key} {name}") for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(as_tensors(each, f"{key} {index}") for index, each in enumerate(value))
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"The dataset's examples have {key} of {type(value).__name__}, which is no number, array or picture; leave "
            "it out by data.inputs, or convert it (with_format, tokens, a transform)."
        ) from error


def _gray(leaf: Tensor) -> Tensor:
    """A gray picture of type uint8 with its channel, anything else as it is."""
    return leaf.unsqueeze(0) if leaf.dtype == torch.uint8 and leaf.ndim == 2 else leaf


def _target(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype == torch.bool else leaf if leaf.is_floating_point() else leaf.to(torch.int64)


def stacked(trees: Iterable[Tree], size: int, rows: Sequence[int]) -> Tree:
    """Examples as one, each tensor ``[size, ...]``.

    Args:
        trees: the examples, read one after another.
        size: how many there are, at least 1.
        rows: what errors call each.

    Raises:
        SettingError: they differ in structure, type or shape.
    """
    whole, expected = None, ""
    for place, tree in enumerate(trees):
        if whole is None:
            whole, expected = mapped(lambda leaf: leaf.new_empty(size, *leaf.shape), tree), _kind(tree)
        if (kind := _kind(tree)) != expected:
            raise SettingError(
                f"The dataset's example {rows[place]} is {kind}, but example {rows[0]} is {expected}; give all "
                "examples the same shape and type, by resizing, cropping or padding."
            )
        mapped(lambda all_of_it, leaf, place=place: all_of_it[place].copy_(leaf), whole, tree)
    return whole


def _kind(tree: Tree) -> str:
    kinds = {
        place: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for place, leaf in by_place(tree).items()
    }
    return ", ".join(f"{place} {kind}".strip() for place, kind in kinds.items())
