"""Random numbers that are a function of (seed, name, index, slot) alone: no generator, no state.

They come from a counter: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
hashes it, for a whole meta-batch at once. So workers, ranks, batch size and what ran before cannot matter, and any
number can be computed at any time.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment: 2**64 divided by the golden ratio, made odd


def _mix(bits: Bits) -> Bits:
    """SplitMix64's finalizer, a bijection of the 64-bit integers."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_bits(seed: int, name: str, indices: Sequence[int] | Integers, slots: int) -> Bits:
    """Random 64-bit integers that depend on (seed, name, index, slot) alone.

    Args:
        seed: any integer.
        name: separates streams of numbers, such as a split's name.
        indices: ``[n]`` integers from 0; each has its own stream.
        slots: how many numbers of each stream.

    Returns:
        ``[n, slots]``.
    """
    key = _mix(np.array([seed % 2**64], np.uint64) + _GAMMA) ^ np.uint64(zlib.crc32(name.encode()))
    streams = _mix(_mix(key) + np.asarray(indices).astype(np.uint64) * _GAMMA)
    return _mix(streams[:, None] + np.arange(1, slots + 1, dtype=np.uint64) * _GAMMA)


def uniform(bits: Bits) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), of the bits' shape, each with the 53 bits that a double holds."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(bits: Bits, n: int | Integers) -> Integers:
    """Random integers in ``[0, n)``, of the bits' shape; ``n < 2**32``."""
    return ((bits >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def choose(bits: Bits, n: int | Integers) -> Integers:
    """Draw ``k`` of ``n`` without replacement, in random order (Floyd's algorithm, then a shuffle).

    Args:
        bits: ``[..., 2 * k]`` random 64-bit integers.
        n: how many there are to draw from, ``k <= n < 2**32``; one number or ``[...]``.

    Returns:
        ``[..., k]`` distinct integers in ``[0, n)``.
    """
    k = bits.shape[-1] // 2
    chosen = np.empty((*bits.shape[:-1], k), np.int64)
    for j in range(k):
        last = np.asarray(n) - k + j
        candidate = below(bits[..., j], last + 1)
        taken = (chosen[..., :j] == candidate[..., None]).any(-1)
        chosen[..., j] = np.where(taken, last, candidate)
    return np.take_along_axis(chosen, bits[..., k:].argsort(-1), -1)


def spread(bits: Bits, room: Integers) -> Integers:
    """Draw one of ``n`` places after another, each that has room left equally likely.

    Args:
        bits: ``[m, k]`` random 64-bit integers.
        room: how often each place can be drawn, ``[m, n]``, together at least ``k``.

    Returns:
        ``[m, k]`` places in ascending order.
    """
    left, rows = room.copy(), np.arange(len(room))
    drawn = np.empty(bits.shape, np.int64)
    for slot in range(bits.shape[1]):
        there = left > 0
        which = below(bits[:, slot], there.sum(1))
        drawn[:, slot] = (there.cumsum(1) > which[:, None]).argmax(1)
        left[rows, drawn[:, slot]] -= 1
    return np.sort(drawn, 1)
