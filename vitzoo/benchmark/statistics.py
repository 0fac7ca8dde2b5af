"""Intervals of ratios of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its interval.

    Attributes:
        value: how often the second time fits into the first: above 1, the second is the faster.
        low, high: ends of the interval, NaN where there are too few samples for one.
        confidence: of the interval.
    """

    value: float
    low: float
    high: float
    confidence: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1

    @property
    def verdict(self) -> str:
        """`faster` or `slower`, where the interval excludes 1; empty otherwise."""
        if not self.differs:
            return ""
        return "faster" if self.low > 1 else "slower"


def ratio_of_medians(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.99, paired: bool = False
) -> Ratio:
    """Return median(first) / median(second) with a percentile bootstrap interval.

    Neighbouring rounds are alike on a busy machine, so that blocks of rounds are resampled and not single ones:
    resampling rounds as if they were independent gives intervals that are too narrow.

    Args:
        first: seconds a call, in the order of the rounds.
        second: likewise.
        confidence: of the interval.
        paired: both were timed in the same rounds, and the same rounds are drawn for both: what slowed a round down
            cancels.

    Raises:
        ValueError: no samples, or paired ones of different lengths.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not len(a) or not len(b):
        raise ValueError(f"a ratio needs samples of both, there are {len(a)} and {len(b)}")
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rounds were not timed in the same rounds")
    value = float(np.median(a) / np.median(b))
    blocks = _blocks(a), _blocks(b)
    if min(len(blocks[0]), len(blocks[1])) < 3:
        return Ratio(value, math.nan, math.nan, confidence)
    low, high = _interval(*blocks, confidence, paired)
    # with few blocks the point estimate, which uses the left-over rounds too, may fall just outside
    return Ratio(value, min(low, value), max(high, value), confidence)


def ratio_of_passes(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    confidence: float = 0.99,
    paired: bool = False,
) -> Ratio:
    """Return how much slower the first is than the second, each timed in several fresh processes, with an interval.

    A pass, one process, counts as one observation, its logarithmic ratio of medians: rounds of one process share its
    memory layout and its moment, and many of them say no more about other processes than a few do. The ratio is the
    geometric mean over passes, the interval Student's, or Welch's where passes are not paired. Of a single pass it is
    the bootstrap interval of `ratio_of_medians`, which knows of that pass alone.

    Args:
        first: seconds a call, in the order of the rounds, a sequence a pass.
        second: likewise.
        confidence: of the interval.
        paired: both were timed in the same passes and rounds.

    Raises:
        ValueError: no samples, or paired ones of different numbers of passes or rounds.
    """
    if paired and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} passes were not timed together")
    if min(len(first), len(second)) < 2:
        return ratio_of_medians(
            [s for samples in first for s in samples],
            [s for samples in second for s in samples],
            confidence,
            paired,
        )
    from scipy.stats import ttest_1samp, ttest_ind

    a, b = (np.log([np.median(samples) for samples in passes]) for passes in (first, second))
    if not any(np.ptp(x) for x in ((a - b,) if paired else (a, b))):  # as of a model beside itself
        low = high = a[0] - b[0]
    else:
        test = ttest_1samp(a - b, 0.0) if paired else ttest_ind(a, b, equal_var=False)
        low, high = test.confidence_interval(confidence)
    return Ratio(float(np.exp(a.mean() - b.mean())), float(np.exp(low)), float(np.exp(high)), confidence)


def change(before: Ratio, after: Ratio) -> Ratio:
    """Return after / before of two independent ratios, with an interval from theirs.

    The limits are those of the method of variance estimates recovery, on logarithms (Zou and Donner, "Construction of
    confidence intervals about a difference", Statistics in Medicine 27, 2008, equation 8).

    Raises:
        ValueError: intervals of different confidence.
    """
    if before.confidence != after.confidence:
        raise ValueError(f"intervals of {before.confidence} and {after.confidence} are not alike")
    b, b_low, b_high = (math.log(x) for x in (before.value, before.low, before.high))
    a, a_low, a_high = (math.log(x) for x in (after.value, after.low, after.high))
    low, high = a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)
    return Ratio(math.exp(a - b), math.exp(low), math.exp(high), after.confidence)


def _blocks(samples: np.ndarray) -> np.ndarray:
    """Cut (rounds,) into (blocks, rounds of a block); rounds that fill no block are left out."""
    length = round(len(samples) ** (1 / 3)) if len(samples) >= 16 else 1
    return samples[: len(samples) // length * length].reshape(-1, length)


def _interval(a: np.ndarray, b: np.ndarray, confidence: float, paired: bool) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def statistic(i: Any, j: Any, axis: int = -1) -> Any:
        # whole blocks are drawn by their numbers: (resamples, blocks) -> (resamples, rounds)
        return np.median(_drawn(a, i), axis=-1) / np.median(_drawn(b, j), axis=-1)

    found = bootstrap(
        (np.arange(len(a)), np.arange(len(b))),
        statistic,
        n_resamples=RESAMPLES,
        paired=paired,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _drawn(blocks: np.ndarray, numbers: Any) -> np.ndarray:
    chosen = blocks[np.asarray(numbers, dtype=int)]
    return chosen.reshape(*chosen.shape[:-2], -1)
