"""From an example's inputs as they are kept to a network's inputs: augmentation, scaling of uint8, normalization."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maml_lightning.data.examples import Tree, is_of_pictures, seeded
from maml_lightning.errors import SettingError
from maml_lightning.structures import by_place, mapped, plain

ROUNDING = 1e-3  # of pictures in [0, 1]


class Preparation(NamedTuple):
    """What is done to inputs: augmentation, then 255 of uint8 pictures becomes 1.0, then normalization.

    Args:
        mean: subtracted from each channel ``C`` of pictures ``[C, H, W]``, or one for all; in the scale of [0, 1].
        std: by which each channel is divided then.
        augmentation: transforms, each called with the inputs of one example, uint8 pictures as such. Their random
            numbers may come from the global generators of PyTorch, NumPy or Python.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    augmentation: Sequence[Callable[[Any], Any]] = ()

    def check(self, inputs: Any) -> None:
        """Check that these settings can be applied to inputs, each tensor ``[examples, ...]``.

        Raises:
            SettingError: they cannot.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None or callable(inputs):
                continue
            if not isinstance(inputs, Tensor) or inputs.ndim != 4:
                shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else "of several tensors"
                raise SettingError(f"data.{name} is for pictures [C, H, W], but examples are {shape}; leave it out.")
            if len(values) not in (1, inputs.shape[1]):
                raise SettingError(
                    f"data.{name} {list(values)} has {len(values)} values for the channels of pictures [C, H, W], but "
                    f"examples are {list(inputs.shape[1:])}; give one value, or one for each channel."
                )
            if not is_of_pictures(inputs) and not inputs.is_floating_point():
                kind = str(inputs.dtype).removeprefix("torch.")
                raise SettingError(
                    f"data.{name} needs pictures of floats or uint8, but examples are {kind}; convert them, such as to "
                    "floats in [0, 1]."
                )
            if not all(math.isfinite(value) for value in values):
                raise SettingError(f"data.{name} must be finite (got {list(values)}); correct it, or leave it out.")
            if name == "mean" and is_of_pictures(inputs) and any(abs(value) > 1 for value in values):
                raise SettingError(
                    f"data.{name} {list(values)} is not in the scale of [0, 1], which uint8 pictures are scaled to; "
                    "divide mean and std by 255."
                )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise SettingError(f"data.std must be above 0 (got {list(self.std)}); leave it out for no scaling.")
        for transform in self.augmentation:
            if not callable(transform) or isinstance(transform, type):
                what = f"the class {transform.__name__}" if isinstance(transform, type) else repr(transform)
                raise SettingError(
                    f"data.augmentation has {what}; give a transform that can be called, made of a class."
                )

    def prepare(self, inputs: Tree, tasks: int, seeds: Sequence[int]) -> Tree:
        """What a network takes.

        Args:
            inputs: each tensor ``[T * n, ...]``.
            tasks: ``T``.
            seeds: of the random numbers of augmentation, ``[T]``.
        """
        if self.augmentation:
            inputs = self._augment(inputs, tasks, seeds)
        inputs = mapped(_scaled, inputs)
        if self.mean is not None:
            inputs = inputs - inputs.new_tensor(self.mean).view(-1, 1, 1)
        return inputs if self.std is None else inputs / inputs.new_tensor(self.std).view(-1, 1, 1)

    def _augment(self, inputs: Tree, tasks: int, seeds: Sequence[int]) -> Tree:
        size = len(next(iter(by_place(inputs).values()))) // tasks
        augmented: list[Tree] = []
        for task, seed in enumerate(seeds):
            with seeded(seed):
                for index in range(task * size, (task + 1) * size):
                    example = mapped(lambda leaf, index=index: leaf[index], inputs)
                    for transform in self.augmentation:
                        example = _transformed(transform, example)
                    augmented.append(example)
        found = mapped(_stacked, *map(plain, augmented), whole=list)
        _check_kept(by_place(inputs), by_place(found))
        return found


AS_THEY_ARE = Preparation()


def say_what_is_scaled(setting: str, inputs: Tree) -> None:
    """Print which inputs, each tensor ``[examples, ...]``, are taken for pictures."""
    shapes = [list(leaf.shape[1:]) for leaf in by_place(inputs).values() if is_of_pictures(leaf)]
    if shapes:
        rank_zero_info(
            f"{setting}: uint8 pictures {shapes[0]} are scaled to [0, 1]; inputs of another type stay as they are."
        )


def _scaled(leaf: Tensor) -> Tensor:
    return leaf.float().div_(255) if is_of_pictures(leaf) else leaf


def _transformed(transform: Callable[[Any], Any], example: Tree) -> Any:
    try:
        return transform(example)
    except Exception as error:  # whatever a transform raises
        kinds = ", ".join(
            f"{leaf.dtype} {list(leaf.shape)}".removeprefix("torch.") for leaf in by_place(example).values()
        )
        name = getattr(transform, "__name__", type(transform).__name__)
        raise SettingError(
            f"data.augmentation {name} does not take an example {kinds} ({' '.join(str(error).split())[:200]}); give "
            "another, or leave it out."
        ) from error


def _check_kept(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Check that augmented inputs are still like those of validation and test, which are not augmented."""
    for place in {**before, **after}:
        ours, theirs = before.get(place), after.get(place)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            kept = False
        else:
            scaled = is_of_pictures(ours) and theirs.dtype == torch.float32
            kept = ours.dtype == theirs.dtype or scaled
            if scaled and theirs.numel() and (theirs.min() < -ROUNDING or theirs.max() > 1 + ROUNDING):
                raise SettingError(
                    f"data.augmentation gives pictures of {theirs.min():.3g} to {theirs.max():.3g}, but validation and "
                    "test, which are not augmented, have 0 to 1; scale by ToDtype with scale true, and normalize by "
                    "data.mean and data.std."
                )
        if not kept:
            kinds = (
                "nothing" if leaf is None else f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape[1:])}"
                for leaf in (theirs, ours)
            )
            raise SettingError(
                "data.augmentation gives {} of an example's {}, but validation and test, which are not augmented, keep "
                "theirs; give transforms that keep shape and type.".format(*kinds)
            )


def _stacked(*values: Any) -> Tensor:
    kinds = {
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in values
    }
    if len(kinds) != 1 or not isinstance(values[0], Tensor):
        raise SettingError(
            f"data.augmentation gives {' and '.join(sorted(kinds))}; give transforms whose results are tensors of one "
            "shape and type."
        )
    return torch.stack(values)
