"""Intervals: they cover what they should, and do not see differences where there are none."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from vitzoo.benchmark.statistics import Ratio, ratio_of_medians, ratio_of_passes


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


def _passes(seed: int, spread: float, count: int = 5) -> list[np.ndarray]:
    """Times around 10 ms of several processes, each of which settles on a level of its own."""
    levels = np.exp(np.random.default_rng(1000 + seed).normal(0, spread, count))
    return [level * _times(count * seed + i, 40) for i, level in enumerate(levels)]


def test_a_ratio_of_passes_by_hand() -> None:
    logs = np.array([0.10, 0.14, 0.06, 0.12, 0.08])
    half = 4.604095 * logs.std(ddof=1) / math.sqrt(5)  # Student's t, 4 degrees of freedom, 99% two-sided
    base = [0.010, 0.012, 0.009, 0.010, 0.011]
    first, second = [[b * math.exp(x)] * 3 for b, x in zip(base, logs, strict=True)], [[b] * 3 for b in base]
    ratio = ratio_of_passes(first, second, paired=True)
    expected = np.exp([0.10, 0.10 - half, 0.10 + half])
    np.testing.assert_allclose([ratio.value, ratio.low, ratio.high], expected, rtol=1e-6)
    apart = ratio_of_passes(first, second)
    assert apart.value == pytest.approx(ratio.value)
    assert apart.low < ratio.low < ratio.high < apart.high


def test_passes_know_what_differs_from_process_to_process() -> None:
    def agreeing(of: Callable[[list[np.ndarray], list[np.ndarray]], Ratio]) -> int:
        runs = [of(_passes(2 * seed, 0.1), _passes(2 * seed + 1, 0.01)) for seed in range(60)]
        return sum(ratio.low <= 1 <= ratio.high for ratio in runs)

    assert agreeing(lambda a, b: ratio_of_passes(a, b, 0.95, paired=True)) >= 54
    assert agreeing(lambda a, b: ratio_of_passes(a, b, 0.95)) >= 54
    # one process each: no number of rounds shows what another process would give
    assert agreeing(lambda a, b: ratio_of_medians(a[0], b[0], 0.95, paired=True)) < 30


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_passes_never_differ(count: int) -> None:
    for seed in range(10):
        passes = _passes(seed, 0.1, count)
        for paired in (False, True):
            ratio = ratio_of_passes(passes, passes, paired=paired)
            assert ratio.value == 1
            assert not ratio.differs


def test_a_single_pass_is_as_without_passes() -> None:
    a, b = _passes(0, 0.1, 1), _passes(1, 0.1, 1)
    assert ratio_of_passes(a, b, paired=True) == ratio_of_medians(a[0], b[0], paired=True)
    assert (
        ratio_of_passes(a, _passes(1, 0.1)).value
        == ratio_of_medians(a[0], np.concatenate(_passes(1, 0.1))).value
    )
    with pytest.raises(ValueError, match="1 and 2 passes were not timed together"):
        ratio_of_passes(a, _passes(1, 0.1, 2), paired=True)


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
