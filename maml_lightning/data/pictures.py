"""Picture files: where they lie, and how one becomes pixels."""

import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from maml_lightning.errors import SettingError

Pixels = npt.NDArray[np.uint8]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def pictures_in(folder: Path, *, nested: bool = False) -> list[Path]:
    """The picture files of a folder, by name; hidden ones and other kinds of files are left out.

    Args:
        folder: to look in.
        nested: whether its folders count as well, however deep.

    Raises:
        SettingError: the folder cannot be read.
    """
    try:
        files = sorted(folder.rglob("*") if nested else folder.iterdir())
    except OSError as error:
        raise SettingError(f"{folder} cannot be read ({error.strerror}); give a folder that can.") from error
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return [file for file in shown if file.suffix.lower() in SUFFIXES and file.is_file()]


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, a folder each, by name.

    Raises:
        SettingError: the folder is missing or cannot be read, or a class has no pictures.
    """
    if not folder.is_dir():
        raise SettingError(f"{folder} is not a folder; give one that holds a folder of pictures for each class.")
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise SettingError(f"{folder} cannot be read ({error.strerror}); give a folder that can.") from error
    found = {path.name: pictures_in(path) for path in classes}
    for name, files in found.items():
        if not files:
            raise SettingError(
                f"{folder / name} holds no pictures ({', '.join(SUFFIXES)}); put some in it or remove it."
            )
    return found


def read_picture(file: Path, side: int, channels: Literal[1, 3], fit: Literal["crop", "pad"]) -> Pixels:
    """A picture as ``[channels, side, side]``, whatever its size and mode; transparency becomes white.

    Args:
        file: to read.
        side: its edge afterwards, in pixels; reduced by Lanczos.
        channels: 1 for grey, 3 for RGB.
        fit: what makes it square, cutting off the longer edges or adding to the shorter ones in the border's colour.

    Raises:
        SettingError: it is no picture, or damaged, or too large; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would clip
                    values = np.asarray(image, np.float64)
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
        raise SettingError(f"{file} is too large a picture ({error}); reduce it.") from error
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "no whole picture"
        raise SettingError(f"{file} cannot be read ({reason}); replace or remove it.") from error


def _padded(image: Image.Image) -> Image.Image:
    """Square, by adding to the shorter edges in the colour of the border (its median)."""
    if image.width == image.height:
        return image
    side, pixels = max(image.size), np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0).astype(int)
    square = Image.new(image.mode, (side, side), int(colour) if colour.ndim == 0 else tuple(colour.tolist()))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fingerprint(files: Iterable[Path]) -> str:
    """Eight letters that change when a file is added, removed, renamed or rewritten."""
    told = "\n".join(
        f"{file.parent.name}/{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files
    )
    return f"{zlib.crc32(told.encode(errors='surrogateescape')):08x}"
