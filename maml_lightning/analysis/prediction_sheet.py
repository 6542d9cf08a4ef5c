"""The contact sheet of predictions: a row for each class, with its support images and its queries, wrong ones first."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from maml_lightning.analysis.drawing import drawable, font, picture
from maml_lightning.analysis.predictions import NONE, Query

SIDE, GAP, MARGIN = 96, 6, 14  # pixels of a picture, between pictures, and around a card
CARD, COLUMNS, SUPPORT = 2 * SIDE + GAP, 4, 2  # width of a card; cards and support images in a line
LINE, BAR, TITLE = 15, 4, 30
RIGHT, WRONG, UNKNOWN = "#1a7f37", "#c62828", "#6e6e6e"
SHOWN = 3  # classes with the highest probabilities


class Pictures(NamedTuple):
    """A query's pictures: the original, and ``[C, H, W]`` in [0, 1] that the network saw."""

    original: Image.Image
    seen: Tensor


class Row(NamedTuple):
    """A row of the sheet: its title, support images ``[n, C, H, W]``, and the numbers of its queries."""

    title: str
    support: Sequence[Tensor]
    queries: Sequence[int]


def rows_of(queries: Sequence[Query], classes: Sequence[str], support: Sequence[Sequence[Tensor]]) -> list[Row]:
    """A row for each class: queries of known class are in its row, others in that of the class predicted.

    Wrong ones come first, those whose class is not known last, each by ascending probability.
    Queries of no class have rows at the end.
    """
    rows = []
    for index, (name, images) in enumerate(zip(classes, support, strict=True)):
        own = [n for n, query in enumerate(queries) if index == _row_of(query)]
        known = [queries[n] for n in own if queries[n].label is not None]
        right = sum(query.predicted == index for query in known)
        counts = [f"{right} of {len(known)} right"] if known else []
        if others := len(own) - len(known):
            counts.append(f"{others} {'more ' if known else ''}predicted")
        rows.append(Row(f"{name}: {', '.join(counts) or 'no queries'}", images, _ordered(own, queries)))
    rejected = [n for n, query in enumerate(queries) if query.label is None and query.rejected]
    broken = [n for n, query in enumerate(queries) if query.label is None and query.nearest is None]
    rows += [Row(f"{NONE}: {len(rejected)}", [], _ordered(rejected, queries))] if rejected else []
    return rows + ([Row(f"outputs not finite: {len(broken)}", [], broken)] if broken else [])


def _row_of(query: Query) -> int | None:
    return query.predicted if query.label is None else query.label


def _ordered(numbers: Sequence[int], queries: Sequence[Query]) -> list[int]:
    def place(number: int) -> tuple[bool, bool, float]:
        query = queries[number]
        return query.label is None, query.label == query.predicted, query.probability

    return sorted(numbers, key=place)


def color_of(query: Query) -> str:
    """Green of a right query, red of a wrong one, grey where its class is not known or it is of no class."""
    if query.label is None or query.rejected:
        return UNKNOWN
    return RIGHT if query.predicted == query.label else WRONG


def legend(queries: Sequence[Query]) -> list[tuple[str, str]]:
    """What each color that is in use means."""
    used = {color_of(query) for query in queries}
    grey = ["class not known"] if any(query.label is None and not query.rejected for query in queries) else []
    grey += [NONE] if any(query.rejected for query in queries) else []
    meanings = (("right", RIGHT), ("wrong", WRONG), (", or ".join(grey), UNKNOWN))
    return [(text, color) for text, color in meanings if color in used]


def prediction_sheet(
    rows: Sequence[Row], queries: Sequence[Query], classes: Sequence[str], pictures: Sequence[Pictures | None]
) -> Image.Image:
    """The sheet.

    Args:
        rows: see `rows_of`.
        queries: what was predicted.
        classes: their names.
        pictures: of each query; None leaves it out.
    """
    lines = [_lines(row, pictures) for row in rows]
    cards = {n: _card(queries[n], classes, found) for n, found in enumerate(pictures) if found is not None}
    heights = [[max([SIDE, *(cards[n].height for n in line)]) + MARGIN for line in row] for row in lines]
    left = SUPPORT * (SIDE + GAP) + 2 * MARGIN
    size = (left + COLUMNS * (CARD + MARGIN), sum(TITLE + sum(row) for row in heights) + 2 * TITLE)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), "support set", "black", font(15))
    head = "queries: the original, what the network saw, the highest probabilities"
    draw.text((left, MARGIN), head, "black", font(15))
    for n, (text, color) in enumerate(legend(queries)):
        draw.text((left + 70 * n, MARGIN + 20), text, color, font(12))
    top = 2 * TITLE
    for row, numbers, tall in zip(rows, lines, heights, strict=True):
        left_out = len(row.queries) - sum(map(len, numbers))
        title = f"{row.title} ({left_out} not shown)" if left_out else row.title
        draw.line([(MARGIN, top), (size[0] - MARGIN, top)], "#cccccc")
        draw.text((MARGIN, top + 7), _fitting(title, size[0] - 2 * MARGIN, 15), "black", font(15))
        top += TITLE
        for n, image in enumerate(row.support[: SUPPORT * len(tall)]):
            at = MARGIN + n % SUPPORT * (SIDE + GAP), top + sum(tall[: n // SUPPORT])
            sheet.paste(picture(image, SIDE), at)
        for line, height in zip(numbers, tall, strict=True):
            for column, n in enumerate(line):
                sheet.paste(cards[n], (left + column * (CARD + MARGIN), top))
            top += height
    return sheet


def _lines(row: Row, pictures: Sequence[Pictures | None]) -> list[list[int]]:
    """The queries of each line of a row; at least one line, for the support images."""
    shown = [n for n in row.queries if pictures[n] is not None]
    return [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)] or [[]]


def _card(query: Query, classes: Sequence[str], pictures: Pictures) -> Image.Image:
    """The query's two pictures, the name of its file and bars of the highest probabilities."""
    color, small = color_of(query), font(12)
    ranked = sorted(range(len(classes)), key=lambda index: -query.probabilities[index])[:SHOWN]
    bars = [] if query.nearest is None else [(classes[n], query.probabilities[n]) for n in ranked]
    texts = [_wrapped(name, CARD - 40) for name, _ in bars]
    head = NONE if query.rejected else "outputs not finite" if query.nearest is None else None
    height = SIDE + 2 + LINE * (1 + (head is not None)) + sum(LINE * len(text) + BAR + 3 for text in texts)
    card = Image.new("RGB", (CARD, height), "white")
    draw = ImageDraw.Draw(card)
    original = pictures.original.convert("RGB")
    scale = SIDE / max(original.size)
    original = original.resize([max(1, round(scale * length)) for length in original.size], Image.Resampling.LANCZOS)
    card.paste(original, ((SIDE - original.width) // 2, (SIDE - original.height) // 2))
    draw.rectangle([(0, 0), (SIDE - 1, SIDE - 1)], outline="#cccccc")
    card.paste(picture(pictures.seen, SIDE), (SIDE + GAP, 0))
    draw.rectangle([(SIDE + GAP - 1, 0), (CARD - 1, SIDE - 1)], outline=color, width=2)
    top = SIDE + 2
    draw.text((0, top), _fitting(query.name, CARD, 11), UNKNOWN, font(11))
    top += LINE
    if head is not None:
        draw.text((0, top), head, color, font(12, bold=True))
        if query.rejected:
            draw.text((CARD - 1, top), f"confidence {query.confidence:.2f}", color, font(11), anchor="ra")
        top += LINE
    for place, ((_, probability), text) in enumerate(zip(bars, texts, strict=True)):
        first = place == 0 and head is None
        own = color if first else UNKNOWN
        draw.text((CARD - 1, top), f"{probability:.2f}", own, small, anchor="ra")
        for line in text:
            draw.text((0, top), line, own, font(12, bold=first))
            top += LINE
        draw.rectangle([(0, top), (CARD - 1, top + BAR - 1)], fill="#eeeeee")
        if (width := round(probability * CARD)) > 0:
            draw.rectangle([(0, top), (width - 1, top + BAR - 1)], fill=own)
        top += BAR + 3
    return card


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most so many pixels, broken anywhere."""
    lines, bold = [""], font(12, bold=True)
    for letter in drawable(text):
        if lines[-1] and bold.getlength(lines[-1] + letter) > width:
            lines.append("")
        lines[-1] += letter
    return lines


def _fitting(text: str, width: int, size: int) -> str:
    """The text; one that is too wide without its middle."""
    text = drawable(text)
    if font(size).getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 1 and font(size).getlength(f"{text[: keep // 2]}…{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}…{text[-(keep // 2) :]}"
