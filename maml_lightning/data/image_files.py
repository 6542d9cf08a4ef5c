"""Image files: where they are, and how one becomes pixels."""

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from maml_lightning.errors import SettingError
from maml_lightning.files import shown

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DecodeError(ValueError):
    """A file that is not a usable image; the message continues a sentence that begins with the file's name."""


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name; hidden ones are left out.

    Raises:
        SettingError: the folder cannot be read.
    """
    with _readable(folder), os.scandir(folder) as found:
        return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)


def image_files(folder: Path, *, nested: bool = False) -> list[Path]:
    """The image files of a folder, by name; hidden files and files of other kinds are left out.

    Args:
        folder: to look in.
        nested: whether to look in its subfolders too, at any depth; links to a parent folder are not followed.

    Raises:
        SettingError: a folder cannot be read, or a link is broken.
    """
    with _readable(folder):
        return sorted(_image_files(folder, (folder.resolve(),) if nested else None))


def _image_files(folder: Path, parents: tuple[Path, ...] | None) -> Iterator[Path]:
    for file in (Path(entry) for entry in entries(folder)):
        if file.is_dir():
            if parents is not None and (resolved := file.resolve()) not in parents:
                yield from _image_files(file, (*parents, resolved))
        elif file.suffix.lower() in SUFFIXES and stat.S_ISREG(file.stat().st_mode):
            yield file


def class_folders(folder: Path, depth: int = 1) -> dict[str, list[Path]]:
    """The image files of each class, at any depth in the class's folder, by name.

    Args:
        folder: holds the classes' folders.
        depth: how many folders deep they are, at least 1. Of a class in ``a/b`` that is the name.

    Raises:
        SettingError: the folder is missing or cannot be read, or a class has no images.
    """
    if not folder.is_dir():
        raise SettingError(f"{shown(folder)} is not a folder; give one that holds a folder of images for each class.")
    with _readable(folder):
        inside = [Path(entry) for entry in entries(folder) if stat.S_ISDIR(entry.stat().st_mode)]
    if depth > 1:
        return {
            f"{path.name}/{name}": files for path in inside for name, files in class_folders(path, depth - 1).items()
        }
    found = {path.name: image_files(path, nested=True) for path in inside}
    for name, files in found.items():
        if not files:
            raise SettingError(
                f"{shown(folder / name)} holds no images ({', '.join(SUFFIXES)}); put some in it or remove it."
            )
    return found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: resolve() of a link to itself
        path, reason = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise SettingError(f"{shown(path)} cannot be read ({reason}); give a folder that can.") from error


def read_image(
    file: Path, side: int, channels: Literal[1, 3], fit: Literal["crop", "pad"], content: bytes | None = None
) -> Pixels:
    """An image as ``[channels, side, side]``, see `decode`.

    Args:
        file: to read.
        side: edge length afterwards, in pixels.
        channels: 1 for grayscale, 3 for RGB.
        fit: how it becomes square.
        content: the file's bytes, if they were read already.

    Raises:
        SettingError: it is not an image, or damaged, or too large; the message names the file.
    """
    try:
        return decode(file if content is None else io.BytesIO(content), side, channels, fit)
    except DecodeError as error:
        raise SettingError(f"{shown(file)} {error}; replace or remove it.") from error


def decode(
    source: Path | io.BytesIO,
    side: int,
    channels: Literal[1, 3],
    fit: Literal["crop", "pad"],
    size: tuple[int, int] | None = None,
) -> Pixels:
    """An image as ``[channels, side, side]``, whatever its size and mode; transparency becomes white.

    16 bits are scaled to 8, floats from [0, 1]; values outside that range, and pictures that would lose all they show,
    are errors.

    Args:
        source: a file or its bytes; of an animation the first frame.
        side: edge length afterwards, in pixels; resized by Lanczos.
        channels: 1 for grayscale, 3 for RGB.
        fit: what makes it square: crop the longer edges, or pad the shorter ones in the border's color.
        size: width and height that it must have, if any.

    Raises:
        DecodeError: it is not an image, or damaged, too large, or of another size or range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as opened:
                if size not in (None, opened.size):
                    raise DecodeError(f"is {opened.size} pixels large, not {size}")
                return pixels_of(opened, side, channels, fit)
    except DecodeError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DecodeError(f"is too large an image ({error})") from error
    except Exception as error:  # PIL's readers raise anything on a damaged file
        raise DecodeError(
            f"cannot be read ({getattr(error, 'strerror', None) or 'it is not a complete image'})"
        ) from error


def pixels_of(image: Image.Image, side: int, channels: Literal[1, 3], fit: Literal["crop", "pad"]) -> Pixels:
    """An opened image as ``[channels, side, side]``, see `decode`."""
    image = eight_bit(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    if fit == "crop":
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    else:
        image = _padded(image).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)


def eight_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits for each value, of whatever mode it is; transparency becomes white.

    Raises:
        DecodeError: its values are out of range.
    """
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would clip
        image = Image.fromarray(_eight_bits(np.asarray(image, np.float64), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _eight_bits(values: npt.NDArray[np.float64], mode: str) -> Pixels:
    """16-bit values, or floats in [0, 1], as 8 bits, all images alike."""
    highest, kind = (1, "floats") if mode.startswith("F") else (65535, "integers of 16 bits")
    if not np.isfinite(values).all():
        raise DecodeError("has values that are NaN or infinite: correct them")
    pixels = (values.clip(0, highest) * 255 / highest).astype(np.uint8)
    if values.min(initial=0) < 0 or values.max(initial=0) > highest or (values.any() and not pixels.any()):
        low, high = (f"{value:.6g}" for value in (values.min(), values.max()))
        black = "" if pixels.any() else ", where these are black"
        raise DecodeError(f"has values {low} to {high}, but {kind} are read as 0 to {highest}{black}: scale them")
    return pixels


def _padded(image: Image.Image) -> Image.Image:
    """Square, by padding the shorter edges in the color of the border (its median)."""
    if image.width == image.height:
        return image
    side, pixels = max(image.size), np.asarray(image)
    if side**2 > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, {side} x {side} when made square")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    color = np.median(border, axis=0).astype(int)
    square = Image.new(image.mode, (side, side), int(color) if color.ndim == 0 else tuple(color.tolist()))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
