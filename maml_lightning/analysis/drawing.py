"""Contact sheets: images with captions, by PIL, which is a hundred times faster at it than matplotlib."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

EDGE, GAP, CAPTION, TITLE = 84, 6, 24, 28  # pixels; TensorBoard shows five tiles at three quarters of their size


class Tile(NamedTuple):
    """An image ``[C, H, W]`` in [0, 1] with its caption and the caption's color."""

    image: Tensor
    caption: str
    color: str = "black"


def contact_sheet(parts: Sequence[tuple[str, Sequence[Tile]]], columns: int = 10) -> Image.Image:
    """Tiles in rows, in parts with titles.

    Args:
        parts: title and tiles of each.
        columns: tiles in a row, at most.
    """
    columns = max(1, min(columns, max(len(tiles) for _, tiles in parts)))
    rows = [-(-len(tiles) // columns) for _, tiles in parts]
    step = EDGE + CAPTION
    size = (columns * (EDGE + GAP) + GAP, TITLE * len(parts) + step * sum(rows))
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (title, tiles), height in zip(parts, rows, strict=True):
        draw.text((GAP, top + 4), drawable(title), "black", font(16))
        top += TITLE
        for index, (image, caption, color) in enumerate(tiles):
            x, y = GAP + index % columns * (EDGE + GAP), top + index // columns * step
            sheet.paste(picture(image, EDGE), (x, y))
            draw.text((x, y + EDGE + 1), drawable(caption), color, font(15))
        top += height * step
    return sheet


def picture(image: Tensor, side: int) -> Image.Image:
    """An image ``[C, H, W]`` in [0, 1], enlarged to a square of ``side`` pixels."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    found = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).convert("RGB")
    return found.resize((side, side), Image.Resampling.NEAREST)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, which has Greek, Cyrillic and more."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def drawable(text: str) -> str:
    """Text in one line, without characters that no font has: line breaks, control characters, undecoded bytes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
