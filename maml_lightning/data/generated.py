"""Generated tasks of several kinds of data, each a function of (seed, index) for `FunctionDataModule`.

Each draws new classes (or a new rule) for every episode, so that those of the test are always unseen. They are for the
configs of the same names, and examples of functions of your own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

WAYS, SHOTS, QUERY_SHOTS = 5, 5, 10
LENGTH = 64  # of a series
VOCABULARY, WORDS, TOPIC = 200, 24, 12  # token ids from 1; of a text; that a class prefers
COLUMNS, INFORMATIVE = 20, 5
LABELS, FEATURES = 4, 6
SIDE = 16  # of a picture, in pixels

Array = npt.NDArray[Any]
Task = tuple[Any, Any, Any, Any]  # of an Episode


def series(seed: int, index: int) -> Task:
    """Time series ``[64, 1]``: a class is a sum of three waves, an example is shifted by up to 4 steps, and noisy."""
    numbers = np.random.default_rng([seed, index])
    frequency, phase = numbers.uniform(1, 8, (WAYS, 3, 1)), numbers.uniform(0, 2 * np.pi, (WAYS, 3, 1))

    def draw(labels: Array) -> Array:
        time = (np.arange(LENGTH) + numbers.uniform(-4, 4, (len(labels), 1, 1))) / LENGTH
        waves = np.sin(2 * np.pi * frequency[labels] * time + phase[labels]).sum(1)
        return _float(waves + 0.3 * numbers.normal(size=waves.shape))[..., None]

    return _classes(draw)


def texts(seed: int, index: int) -> Task:
    """Token ids ``[24]``, int64: a class prefers 12 of 200 tokens; 0 fills texts up that are shorter."""
    numbers = np.random.default_rng([seed, index])
    topics = np.stack([numbers.choice(np.arange(1, VOCABULARY), TOPIC, replace=False) for _ in range(WAYS)])

    def draw(labels: Array) -> Array:
        size = (len(labels), WORDS)
        preferred = np.take_along_axis(topics[labels], numbers.integers(TOPIC, size=size), 1)
        tokens = np.where(numbers.random(size) < 0.7, preferred, numbers.integers(1, VOCABULARY, size))
        return np.where(np.arange(WORDS) < numbers.integers(WORDS // 2, WORDS + 1, (len(labels), 1)), tokens, 0)

    return _classes(draw)


def table(seed: int, index: int) -> Task:
    """Rows of 20 columns, of which the first 5 tell classes apart, in every task; the others are noise."""
    numbers = np.random.default_rng([seed, index])
    centers = np.zeros((WAYS, COLUMNS))
    centers[:, :INFORMATIVE] = 2 * numbers.normal(size=(WAYS, INFORMATIVE))
    return _classes(lambda labels: _float(centers[labels] + numbers.normal(size=(len(labels), COLUMNS))))


def measurements(seed: int, index: int) -> Task:
    """Two inputs by name, ``input1`` ``[6]`` and ``input2`` ``[3]``, both noisy around those of the class."""
    numbers = np.random.default_rng([seed, index])
    centers = {name: 2 * numbers.normal(size=(WAYS, size)) for name, size in (("input1", 6), ("input2", 3))}

    def draw(labels: Array) -> dict[str, Array]:
        return {
            name: _float(center[labels] + 0.5 * numbers.normal(size=(len(labels), center.shape[1])))
            for name, center in centers.items()
        }

    return _classes(draw)


def several_labels(seed: int, index: int) -> Task:
    """Rows ``[6]`` with 4 labels each, 1.0 or 0.0: each is true on one side of a plane of its own."""
    numbers = np.random.default_rng([seed, index])
    planes = numbers.normal(size=(FEATURES, LABELS))
    sets = [numbers.normal(size=(count, FEATURES)) for count in (WAYS * SHOTS, WAYS * QUERY_SHOTS)]
    return tuple(_float(part) for inputs in sets for part in (inputs, inputs @ planes > 0))  # type: ignore[return-value]


def segments(seed: int, index: int) -> Task:
    """Pictures ``[3, 16, 16]`` with a disk of the task's color on another color; targets are its pixels, 1 and 0."""
    numbers = np.random.default_rng([seed, index])
    colors = numbers.random((2, 3))
    y, x = np.mgrid[:SIDE, :SIDE]
    parts: list[Array] = []
    for count in (SHOTS, QUERY_SHOTS):
        center, radius = numbers.uniform(4, SIDE - 4, (2, count, 1, 1)), numbers.uniform(3, 5, (count, 1, 1))
        disk = ((y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2).astype(np.int64)
        pictures = colors[disk].transpose(0, 3, 1, 2)
        parts += [_float(pictures + 0.1 * numbers.normal(size=pictures.shape)), disk]
    return tuple(parts)  # type: ignore[return-value]


def _classes(draw: Callable[[Array], Any]) -> Task:
    """An episode of inputs that are drawn for labels ``[n]``."""
    support, query = (np.arange(WAYS).repeat(shots) for shots in (SHOTS, QUERY_SHOTS))
    return draw(support), support, draw(query), query


def _float(values: Array) -> Array:
    return values.astype(np.float32)
