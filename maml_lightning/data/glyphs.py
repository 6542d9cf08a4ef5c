"""Generated handwriting-like characters ("glyphs"), a stand-in for Omniglot that needs no download.

A class is a program of one to four strokes. A stroke is the path of a pen that starts in some direction and turns:
steadily (lines, arcs, loops), to and fro (S-curves) and at most twice sharply (corners):

    heading(t) = heading + turn * (t - 1/2) + wave * sin(2 pi t) + corner * [t > corner_at],   t in [0, 1]

and most strokes are attached to a point of an earlier one. A drawing is the program with noise in all of its numbers,
a slow tremor, and an affine distortion. It is rendered on 105x105 pixels with a round pen and resized to 28x28 by
Lanczos, like Omniglot's drawings. The constants below were fitted by eye and to three statistics of Omniglot at 28x28
(mean ink, fraction of pixels above one half, accuracy of 5-way 1-shot nearest neighbors in pixels).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maml_lightning.data.checks import at_least
from maml_lightning.data.datasets import Split
from maml_lightning.data.modules import EpisodicDataModule
from maml_lightning.data.random_numbers import random_bits, uniform

Floats = npt.NDArray[np.float64]

Floats32 = npt.NDArray[np.float32]

GLYPHS_SEED = 0  # of the characters themselves; not a setting, so that checkpoints and results are comparable
FIRST: dict[Split, int] = {"train": 0, "val": 2**24, "test": 2**25}  # class numbers: splits of any size are disjoint
STROKES, POINTS = 4, 64
CANVAS, SIDE = 105, 28
PEN = 2.5  # half the width of a stroke on the canvas, in pixels
IMAGES_AT_ONCE = 1280  # limits the memory (60 MB), changes no pixel


class _Noise:
    """Random numbers for each of ``indices`` (any shape): each has its own stream of at most ``slots`` numbers."""

    def __init__(self, name: str, indices: npt.NDArray[np.int64], slots: int):
        bits = random_bits(GLYPHS_SEED, name, indices.ravel(), slots).reshape(*indices.shape, slots)
        self._uniform: Floats = uniform(bits)
        self._used = 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """``[*indices.shape, *shape]`` numbers in [low, high)."""
        taken = slice(self._used, self._used + math.prod(shape))
        self._used = taken.stop
        return low + (high - low) * self._uniform[..., taken].reshape(*self._uniform.shape[:-1], *shape)

    def normal(self, *shape: int) -> Floats:
        """``[*indices.shape, *shape]`` standard normal numbers (Box and Muller 1958)."""
        radius: Floats = np.sqrt(-2 * np.log1p(-self.uniform(*shape)))
        return radius * np.cos(2 * np.pi * self.uniform(*shape))


def _lanczos(size: int, reduced: int) -> Floats32:
    """Weights ``[reduced, size]`` of a Lanczos-3 reduction, in 1024ths: sums of inked pixels are exact in float32."""
    scale = size / reduced
    offsets = (np.arange(size) + 0.5) / scale - (np.arange(reduced)[:, None] + 0.5)
    weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    rounded: Floats32 = np.round(1024 * weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return rounded / np.float32(1024)


def _paths(classes: npt.NDArray[np.int64], drawings: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The paths of the pen ``[n, drawings, STROKES, POINTS, 2]``, and which strokes exist ``[n, 1, STROKES]``."""
    # the program: [n, 1, STROKES], corners [n, 1, STROKES, 2]
    program = _Noise("program", classes[:, None], 128)
    strokes = 1 + np.searchsorted([0.1, 0.42, 0.77], program.uniform(1), side="right")
    present = np.arange(STROKES) < strokes
    heading = np.floor(program.uniform(STROKES, high=4)) * np.pi / 2 + 0.3 * program.normal(STROKES) ** 3
    kind = program.uniform(STROKES)
    turn = program.uniform(STROKES, low=-1.0, high=1.0) * np.select([kind < 0.45, kind < 0.85], [0.0, 4.5], 7.0)
    wave = np.where(program.uniform(STROKES) < 0.2, program.uniform(STROKES, low=-2.2, high=2.2), 0.0)
    sign = np.floor(program.uniform(STROKES, 2, high=2)) * 2 - 1
    corner = np.where(program.uniform(STROKES, 2) < 0.33, sign * (1.6 + 0.4 * program.normal(STROKES, 2)), 0.0)
    corner_at = np.array([0.15, 0.5]) + program.uniform(STROKES, 2, high=0.35)
    bend = np.abs(turn) + 0.5 * np.abs(corner).sum(-1)
    length = program.uniform(STROKES, low=0.45, high=1.1) * (1 + 0.25 * bend)
    ends = np.array([0.0, 0.5, 1.0])
    own = ends[(program.uniform(STROKES) * 3).astype(int)]
    other = program.uniform(STROKES)
    other = np.where(program.uniform(STROKES) < 0.6, ends[(other * 3).astype(int)], other)
    host = program.uniform(STROKES)
    loose = program.uniform(STROKES, 1) < 0.35
    gap = np.where(loose, program.uniform(STROKES, 2, low=-0.7, high=0.7), 0.0)
    size = program.uniform(1, low=45, high=85)

    # the hand: [n, drawings, STROKES]
    hand = _Noise("hand", classes[:, None] * 2**32 + np.arange(drawings), 128)
    heading = heading + 0.1 * hand.normal(STROKES)
    turn = turn * (1 + 0.18 * hand.normal(STROKES)) + 0.15 * hand.normal(STROKES)
    wave = wave * (1 + 0.2 * hand.normal(STROKES))
    corner = corner * (1 + 0.12 * hand.normal(STROKES, 2))
    corner_at = corner_at + 0.05 * hand.normal(STROKES, 2)
    length = length * np.exp(0.18 * hand.normal(STROKES))
    gap = gap + 0.06 * hand.normal(STROKES, 2)
    other = np.clip(other + 0.06 * hand.normal(STROKES), 0, 1)
    tremor, phase = 0.1 * hand.normal(STROKES), hand.uniform(STROKES, high=2 * np.pi)

    points = _pen_path(heading, turn, wave, corner, corner_at, length, tremor, phase)
    fixed = np.broadcast_to((own * (POINTS - 1)).astype(int)[..., None, None], (*points.shape[:3], 1, 2))
    points -= np.take_along_axis(points, fixed, -2)
    rows, columns = np.arange(len(classes))[:, None], np.arange(drawings)
    for stroke in range(1, STROKES):
        earlier, place = (host[..., stroke] * stroke).astype(int), (other[..., stroke] * (POINTS - 1)).astype(int)
        points[:, :, stroke] += (points[rows, columns, earlier, place] + gap[:, :, stroke])[:, :, None]
    return _placed(points, present, size, hand), present


def _pen_path(
    heading: Floats,
    turn: Floats,
    wave: Floats,
    corner: Floats,
    corner_at: Floats,
    length: Floats,
    tremor: Floats,
    phase: Floats,
) -> Floats:
    """Strokes that begin at the origin, ``[n, drawings, STROKES, POINTS, 2]``: the module's equation, integrated."""
    t = (np.arange(POINTS) + 0.5) / POINTS
    angle = (
        heading[..., None]
        + turn[..., None] * (t - 0.5)
        + wave[..., None] * np.sin(2 * np.pi * t)
        + (corner[..., None] * (t > corner_at[..., None])).sum(-2)
        + tremor[..., None] * np.sin(3 * np.pi * t + phase[..., None])
    )
    steps = np.stack([np.cos(angle), np.sin(angle)], -1) * (length / POINTS)[..., None, None]
    return steps.cumsum(-2)


def _placed(points: Floats, present: npt.NDArray[np.bool_], size: Floats, hand: _Noise) -> Floats:
    """Points in pixels: slanted, rotated, the bounding box a little squarer and placed near the canvas's center."""
    x, y = points[..., 0], points[..., 1]
    x = x + 0.1 * hand.normal(1, 1) * y
    rotation = 0.07 * hand.normal(1, 1)
    points = np.stack([x * np.cos(rotation) - y * np.sin(rotation), x * np.sin(rotation) + y * np.cos(rotation)], -1)
    exists = present[..., None, None]
    low = np.where(exists, points, np.inf).min((2, 3), keepdims=True)
    high = np.where(exists, points, -np.inf).max((2, 3), keepdims=True)
    box = high - low
    stretch = np.clip((box[..., ::-1] / box) ** 0.15, 0.75, 1.33) * np.exp(0.07 * hand.normal(1, 1, 2))
    extent = np.clip(size[..., None] * np.exp(0.1 * hand.normal(1, 1)), 25, 92)[..., None]
    points = (points - (low + high) / 2) * stretch * (extent / (stretch * box).max(-1, keepdims=True))
    center = np.clip(50 + 5 * hand.normal(1, 1, 2), extent / 2 + PEN, CANVAS - 1 - PEN - extent / 2)
    return points + center


def glyphs(first: int, classes: int, drawings: int = 20) -> Tensor:
    """Render the classes ``first … first + classes - 1``.

    Drawing ``d`` of class ``c`` is a function of (``c``, ``d``) alone.

    Args:
        first: number of the first class, from 0.
        classes: how many classes, at least 1.
        drawings: drawings of each, at least 1.

    Returns:
        ``[classes, drawings, 28, 28]`` uint8, ink = 255.
    """
    numbers = np.arange(first, first + classes)
    chunks = np.array_split(numbers, min(classes, math.ceil(classes * drawings / IMAGES_AT_ONCE)))
    return torch.cat([_render(chunk, drawings) for chunk in chunks])


def _render(classes: npt.NDArray[np.int64], drawings: int) -> Tensor:
    points, present = _paths(classes, drawings)
    exists = np.broadcast_to(present[..., None], points.shape[:-1])
    numbers = np.arange(len(classes) * drawings).reshape(len(classes), drawings, 1, 1)
    image = np.broadcast_to(numbers, exists.shape)[exists]
    x, y = np.round(points[exists]).astype(np.int64).T  # the whole pen stays within the canvas
    canvas = np.zeros((len(classes) * drawings, CANVAS, CANVAS), np.float32)
    reach = range(-math.ceil(PEN), math.ceil(PEN) + 1)
    for dx, dy in ((dx, dy) for dx in reach for dy in reach if dx * dx + dy * dy <= PEN * PEN):
        canvas[image, y + dy, x + dx] = 1
    weights = _lanczos(CANVAS, SIDE)
    reduced = torch.from_numpy(weights) @ torch.from_numpy(canvas) @ torch.from_numpy(weights.T)
    return (reduced * 255).round_().clamp_(0, 255).byte().view(len(classes), drawings, SIDE, SIDE)


class GlyphsDataModule(EpisodicDataModule):
    """Episodes of generated handwriting-like characters ("glyphs"), ``[1, 28, 28]``, ink = 1 on 0; needs no download.

    Args:
        train_classes: characters for training, at least 2; 1000 take about 4 seconds to generate.
        val_classes: characters for validation, at least 2, disjoint from those.
        test_classes: characters for the test, at least 2, disjoint from both.
        drawings: drawings of each character, at least ``shots + query_shots``.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        train_classes: int = 1000,
        val_classes: int = 100,
        test_classes: int = 400,
        drawings: int = 20,
        **settings: Any,
    ):
        super().__init__(**settings)
        at_least("train_classes", train_classes, 2)
        at_least("val_classes", val_classes, 2)
        at_least("test_classes", test_classes, 2)
        at_least("drawings", drawings, 2)
        self.classes: dict[Split, int] = {"train": train_classes, "val": val_classes, "test": test_classes}
        self.drawings = drawings

    def load_split(self, split: Split) -> Tensor:
        """The images of a split: ``[classes, drawings, 28, 28]``, uint8, ink = 255."""
        return glyphs(FIRST[split], self.classes[split], self.drawings)
