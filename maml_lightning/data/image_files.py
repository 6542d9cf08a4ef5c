"""Picture files: where they lie, and how one becomes pixels."""

import io
import math
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


def pictures_in(folder: Path, *, nested: bool = False) -> list[Path]:
    """The picture files of a folder, by name; hidden ones and other kinds of files are left out.

    Args:
        folder: to look in.
        nested: whether its folders count as well, however deep; links to one that they lie in do not.

    Raises:
        SettingError: a folder cannot be read, or a link leads nowhere.
    """
    try:
        return sorted(_pictures(folder, (folder.resolve(),) if nested else None))
    except (OSError, RuntimeError) as error:  # RuntimeError: resolve() of a link that leads to itself
        at, why = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise SettingError(f"{shown(at)} cannot be read ({why}); give a folder that can.") from error


def _pictures(folder: Path, above: tuple[Path, ...] | None) -> Iterator[Path]:
    """Those of a folder; and of its folders unless they are among those above."""
    for entry in _entries(folder):
        if entry.is_dir():
            if above is not None and (within := entry.resolve()) not in above:
                yield from _pictures(entry, (*above, within))
        elif entry.suffix.lower() in SUFFIXES and stat.S_ISREG(entry.stat().st_mode):
            yield entry


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, by name, hidden entries left out."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, a folder each, by name.

    Raises:
        SettingError: the folder is missing or cannot be read, or a class has no pictures.
    """
    if not folder.is_dir():
        raise SettingError(f"{shown(folder)} is not a folder; give one that holds a folder of pictures for each class.")
    try:
        classes = [path for path in _entries(folder) if stat.S_ISDIR(path.stat().st_mode)]
    except OSError as error:
        at = error.filename or folder
        raise SettingError(f"{shown(at)} cannot be read ({error.strerror}); give a folder that can.") from error
    found = {path.name: pictures_in(path) for path in classes}
    for name, files in found.items():
        if not files:
            raise SettingError(
                f"{shown(folder / name)} holds no pictures ({', '.join(SUFFIXES)}); put some in it or remove it."
            )
    return found


def read_picture(
    file: Path, side: int, channels: Literal[1, 3], fit: Literal["crop", "pad"], content: bytes | None = None
) -> Pixels:
    """A picture as ``[channels, side, side]``, whatever its size and mode; transparency becomes white.

    Args:
        file: to read; of an animation the first picture.
        side: its edge afterwards, in pixels; reduced by Lanczos.
        channels: 1 for grey, 3 for RGB.
        fit: what makes it square, cutting off the longer edges or adding to the shorter ones in the border's colour.
        content: the file's bytes, where they are at hand.

    Raises:
        SettingError: it is no picture, or damaged, or too large; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file if content is None else io.BytesIO(content)) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would clip
                    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0).clip(0)
                    image = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert("L" if channels == 1 else "RGB")
                if fit == "crop":
                    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
                else:
                    image = _padded(image).resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SettingError(f"{shown(file)} is too large a picture ({error}); reduce it.") from error
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them trip over
        reason = getattr(error, "strerror", None) or "no whole picture"
        raise SettingError(f"{shown(file)} cannot be read ({reason}); replace or remove it.") from error


def _padded(image: Image.Image) -> Image.Image:
    """Square, by adding to the shorter edges in the colour of the border (its median)."""
    if image.width == image.height:
        return image
    side, pixels = max(image.size), np.asarray(image)
    if side**2 > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, {side} x {side} when made square")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0).astype(int)
    square = Image.new(image.mode, (side, side), int(colour) if colour.ndim == 0 else tuple(colour.tolist()))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
