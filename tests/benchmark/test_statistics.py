"""Bootstrap intervals: they cover what they should, and do not see differences where there are none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vitzoo.benchmark.statistics import ratio_of_medians


def _times(seed: int, rounds: int = 60, drift: float = 0.0) -> np.ndarray:
    """Times around 10 ms whose neighbours are alike if there is drift."""
    random = np.random.default_rng(seed)
    noise, level = random.normal(0, 0.02, rounds), 0.0
    for i in range(rounds):
        level = drift * level + noise[i]
        noise[i] = level
    return 0.01 * np.exp(noise)


def test_a_ratio_of_known_medians() -> None:
    ratio = ratio_of_medians([2.0, 2.0, 2.0, 2.2], [1.0, 1.0, 1.0, 0.9])
    assert (ratio.value, ratio.confidence) == (2.0, 0.99)
    assert 1 < ratio.low <= ratio.value <= ratio.high
    assert ratio.differs


@pytest.mark.parametrize("rounds", [3, 10, 60, 500])
def test_the_same_samples_never_differ(rounds: int) -> None:
    for seed in range(10):
        times = _times(seed, rounds, 0.5)
        for paired in (False, True):
            ratio = ratio_of_medians(times, times, paired=paired)
            assert ratio.value == 1
            assert not ratio.differs


@pytest.mark.parametrize("drift", [0.0, 0.6])
def test_intervals_cover_the_truth(drift: float) -> None:
    found = [
        ratio_of_medians(_times(2 * seed, 200, drift), _times(2 * seed + 1, 200, drift) / 1.1, 0.95)
        for seed in range(60)
    ]
    covered = sum(ratio.low <= 1.1 <= ratio.high for ratio in found)
    assert covered >= (50 if drift else 54)
    assert all(ratio.high / ratio.low < 1.1 for ratio in found)


def test_pairing_cancels_what_both_share() -> None:
    shared = np.exp(np.random.default_rng(0).normal(0, 0.5, 60))
    slow, fast = _times(1) * 1.1 * shared, _times(2) * shared
    assert ratio_of_medians(slow, fast, paired=True).differs
    assert not ratio_of_medians(slow, fast).differs


def test_too_few_samples_have_no_interval() -> None:
    ratio = ratio_of_medians([2.0, 2.0], [1.0, 1.0])
    assert ratio.value == 2
    assert math.isnan(ratio.low)
    assert not ratio.differs


def test_wrong_samples() -> None:
    with pytest.raises(ValueError, match="there are 0 and 1"):
        ratio_of_medians([], [1.0])
    with pytest.raises(ValueError, match="3 and 4 rounds were not timed in the same rounds"):
        ratio_of_medians([1.0] * 3, [1.0] * 4, paired=True)
