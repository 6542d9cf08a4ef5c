"""Pictures of one's own as a network takes them, and support sets of them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from maml_lightning.data.image_files import DecodeError, Pixels, class_folders, pixels_of, read_image
from maml_lightning.episodes import InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

FAINT = 0.8  # of full ink; below it an image's contrast is raised
OPPOSITE, APART = 127, 5  # of 255: how far the border is from the background, at most, in an image that is not changed
_OF_DRAWINGS = {
    "invert": f"where the median of the border is more than {OPPOSITE} of 255 from the background",
    "shift": f"the median of the border to the background, where it is then more than {APART} of 255 away",
    "contrast": "the largest difference from the background to 255, where it was shifted or that is below "
    f"{255 * FAINT:g}",
}

Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor
Support = str | Path | Mapping[str, Sequence[Picture]]  # a folder, or pictures by class


class Prepared(NamedTuple):
    """Images as a network takes them, and how many of them each change was made to."""

    inputs: Tensor
    changes: dict[str, int]


def read_images(pictures: Sequence[Picture], spec: InputSpec) -> Prepared:
    """Match pictures to a network's training images: size, channels and, for drawings, ink and background.

    If the training images had a plain background, images of the opposite polarity are inverted, their background is
    shifted to that of the training images, and faint ink is raised to full contrast.

    Args:
        pictures: ``n`` files, PIL images, arrays ``[H, W]`` or ``[H, W, 1 | 3 | 4]``, or tensors ``[(C,) H, W]``, of
            any size. Arrays and tensors are uint8, or floats in [0, 1].
        spec: what the network was trained on.

    Returns:
        inputs ``[n, C, H, W]`` in [0, 1], and how many images each change was made to.

    Raises:
        SettingError: a picture cannot be read.
    """
    changes = {"padded to a square": 0, "inverted": 0, "shifted to the background": 0, "raised in contrast": 0}
    images: list[Pixels] = []
    for number, picture in enumerate(pictures):
        pixels, square = _read(picture, number, spec)
        changes["padded to a square"] += not square
        if spec.background is not None:
            target = round(255 * spec.background)
            if abs(_border(pixels) - target) > OPPOSITE:
                pixels, changes["inverted"] = 255 - pixels, changes["inverted"] + 1
            ink = pixels.astype(np.float64) - target
            if abs(base := _border(pixels) - target) > APART:
                ink, changes["shifted to the background"] = ink - base, changes["shifted to the background"] + 1
            peak = np.abs(ink).max()
            if abs(base) > APART or 0 < peak < 255 * FAINT:
                changes["raised in contrast"] += 0 < peak < 255 * FAINT
                pixels = (target + ink * 255 / max(peak, 1)).clip(0, 255).round().astype(np.uint8)
        images.append(pixels)
    return Prepared(torch.from_numpy(np.stack(images)).float() / 255, changes)


def preprocessing(spec: InputSpec) -> dict[str, Any]:
    """How a picture becomes an input, as `read_images` and the specification do it; null where nothing is done."""
    return {
        "channels": spec.channels,
        "size": spec.side,
        "square": "pad with the median color of the border",
        "resize": "lanczos",
        "transparency": "white",
        "scale": 1 / 255,
        "background": spec.background,
        **(_OF_DRAWINGS if spec.background is not None else dict.fromkeys(_OF_DRAWINGS)),
        "mean": None if spec.mean is None else list(spec.mean),
        "std": None if spec.std is None else list(spec.std),
    }


def _read(picture: Picture, number: int, spec: InputSpec) -> tuple[Pixels, bool]:
    """The pixels of a picture, and whether it was square."""
    if isinstance(picture, str | os.PathLike):
        pixels = read_image(Path(picture), spec.side, spec.channels, "pad")
        with Image.open(picture) as opened:
            return pixels, opened.width == opened.height
    try:
        image = picture if isinstance(picture, Image.Image) else _of_array(picture)
        return pixels_of(image, spec.side, spec.channels, "pad"), image.width == image.height
    except DecodeError as error:
        raise SettingError(f"Picture {number} {error}.") from error


def _of_array(picture: Any) -> Image.Image:
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().numpy()
        picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture
    if not isinstance(picture, np.ndarray):
        raise DecodeError(f"is of {type(picture).__name__}: give a file, a PIL image, an array or a tensor")
    values = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    if not values.size or (values.ndim != 2 and (values.ndim != 3 or values.shape[2] not in (3, 4))):
        raise DecodeError(
            f"is an array of {list(picture.shape)}: give [H, W] or [H, W, 1, 3 or 4], of a tensor [C, H, W]"
        )
    if values.dtype == np.bool_ or np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise DecodeError(f"has floats {values.min():.6g} to {values.max():.6g}: scale them to [0, 1]")
        values = (255 * values.astype(np.float64)).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise DecodeError(f"is an array of {values.dtype}: give uint8, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(values))


def _border(pixels: Pixels) -> float:
    edges = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return float(np.median(np.concatenate(edges, axis=1)))


def support_set(support: Support, spec: InputSpec) -> tuple[Tensor, Tensor, list[str]]:
    """Read a support set, one folder per class, to adapt on.

    Args:
        support: ``FOLDER/CLASS/*.png``, or other formats, any number of images per class; or the pictures of each class
            by its name.
        spec: what the network was trained on, ``maml.inputs``.

    Returns:
        inputs ``[n, C, H, W]``, normalized as the network takes them, targets ``[n]`` and the names of the classes.

    Raises:
        SettingError: there are fewer than 2 classes, a class has no images, or something cannot be read.
    """
    classes = support if isinstance(support, Mapping) else classes_of(Path(support))
    if len(classes) < 2 or not all(len(pictures) for pictures in classes.values()):
        raise SettingError(f"A support set needs pictures of at least 2 classes (got {_counts(classes)}); give some.")
    inputs = read_images([picture for pictures in classes.values() for picture in pictures], spec).inputs
    return spec.normalized(inputs), targets_of(classes), list(classes)


def _counts(classes: Mapping[str, Sequence[Picture]]) -> str:
    return ", ".join(f"{len(pictures)} of {shown(name)}" for name, pictures in classes.items()) or "none"


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each class of a support set, by name.

    Raises:
        SettingError: there are fewer than 2 classes, or a folder cannot be read.
    """
    classes = class_folders(folder)
    if len(classes) < 2:
        raise SettingError(
            f"{shown(folder)} holds {len(classes)} folder{'s' * (len(classes) != 1)} of images; give one for each of "
            "at least 2 classes."
        )
    return classes


def targets_of(classes: Mapping[str, Sequence[Any]]) -> Tensor:
    """The class of each picture ``[n]``, class after class."""
    return torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in classes.values()]))


def check_ways(setting: str, classes: int, spec: InputSpec, head: str) -> None:
    """Check that a network can classify among so many classes.

    Raises:
        SettingError: it was trained on fewer, and its last layer is learned.
    """
    if classes > spec.ways and head != "prototypes":
        raise SettingError(
            f"{setting} holds {classes} classes, but the checkpoint classifies among {spec.ways}; remove some, or "
            f"train one with --data.ways {classes}, or for any number of classes with --model.head prototypes."
        )


NO_SPEC = (
    "does not record what images its network was trained on: they were not square, or normalized in another way than "
    "by data.mean and data.std, or it is of an earlier version"
)
