"""Random numbers: exact values of the streams, and uniformity."""

from collections import Counter

import numpy as np

from maml_lightning.data.random_numbers import _GAMMA, _mix, choose, random_bits, uniform


def test_the_hash_is_splitmix64():
    """The reference outputs of SplitMix64 for the seed 1234567, as published with other implementations."""
    counter = np.array([1234567], np.uint64) + np.arange(1, 4, dtype=np.uint64) * _GAMMA
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _mix(counter).tolist() == expected


def test_streams_differ_by_seed_name_and_index():
    draws = [
        random_bits(seed, name, [index], 4).tobytes()
        for seed in (-1, 0, 1, 2**63)
        for name in ("train", "val")
        for index in (0, 1, 2**40)
    ]
    assert len(set(draws)) == 4 * 2 * 3


def test_choose_is_uniform_over_ordered_pairs():
    pairs = choose(random_bits(0, "pairs", range(12000), 4), 4)
    counts = Counter(map(tuple, pairs.tolist()))
    assert len(counts) == 12  # 4 * 3, none with a repeat
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 31.3  # 99.9 % quantile for 11 degrees of freedom


def test_choose_can_take_all():
    assert (np.sort(choose(random_bits(0, "all", range(50), 12), 6)) == np.arange(6)).all()


def test_uniform_numbers_keep_53_bits():
    bits = np.array([0, 2**11 - 1, 2**11, 2**63, 2**64 - 1], np.uint64)
    assert uniform(bits).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
