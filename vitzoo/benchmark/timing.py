"""Time callables side by side: warm-up until stable, interleaved rounds, medians and their spread.

On a machine that others use too, one measurement after another compares the neighbours' load. Here every
round calls each candidate once, in turn, so that a slow moment hits all alike and ratios survive it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the accelerator, if there is one

Work = Callable[[], Any]
Progress = Callable[[str, float], None]

BLOCK_SECONDS = 1e-3  # a shorter call is timed in blocks of several
WARMUP_CALLS = 5
STABLE = 0.05


@dataclass(frozen=True)
class Timing:
    """Times of one candidate.

    Attributes:
        name: the candidate.
        seconds: seconds a call, one entry a round; entries of one position belong to the same round.
        calls_per_round: calls that an entry is the mean of.
        warmup_calls: calls made before, not counted.
        threads: CPU threads inside an operator.
        images: images a call processes.
    """

    name: str
    seconds: tuple[float, ...] = field(repr=False)
    calls_per_round: int
    warmup_calls: int
    threads: int
    images: int = 1

    @property
    def measurement(self) -> Measurement:
        """The times as torch.utils.benchmark has them, for its statistics and tables."""
        task = TaskSpec(stmt=self.name, setup="", label="vitzoo", num_threads=self.threads)
        times = [t * self.calls_per_round for t in self.seconds]
        return Measurement(number_per_run=self.calls_per_round, raw_times=times, task_spec=task)

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return self.measurement.median

    @property
    def iqr(self) -> float:
        """Distance between the quartiles, seconds."""
        return self.measurement.iqr

    def percentile(self, percent: float) -> float:
        """Return the seconds that `percent` per cent of the rounds stay under."""
        return float(np.percentile(self.seconds, percent))

    @property
    def images_per_second(self) -> float:
        """Images a second at the median."""
        return self.images / self.median

    def ratio_to(self, other: Timing) -> float:
        """Return how often this one fits into the other: the median over rounds of other / this.

        Raises:
            ValueError: the two were not timed in the same rounds.
        """
        if len(self.seconds) != len(other.seconds):
            raise ValueError(f"{self.name!r} and {other.name!r} were not timed in the same rounds")
        return float(np.median(np.divide(other.seconds, self.seconds)))


def compare(
    candidates: Mapping[str, Work],
    *,
    seconds: float = 2.0,
    min_rounds: int = 10,
    warmup_seconds: float = 2.0,
    threads: int | None = None,
    images: int | Mapping[str, int] = 1,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time candidates in interleaved rounds A B C A B C ...

    Args:
        candidates: name -> what to call, without arguments.
        seconds: time to spend on each, warm-up not included; rounds go on until the mean candidate has had
            it.
        min_rounds: rounds at least, however long they take.
        warmup_seconds: bound on the warm-up of each; it ends before when the times are stable.
        threads: CPU threads inside an operator while timing; PyTorch's number if None.
        images: images a call processes, one number or one a candidate.
        progress: told the present step and the share of the whole that is done.

    Returns:
        name -> times, in the order given.

    Raises:
        ValueError: no candidate, or a number that makes no sense.
        Exception: whatever a candidate raises.
    """
    if not candidates:
        raise ValueError("there is nothing to time")
    for what, value in (("seconds", seconds), ("min_rounds", min_rounds)):
        if value <= 0:
            raise ValueError(f"{what} {value} is not positive")
    tell = progress or _silent
    with _threads(threads) as count:
        blocks: dict[str, tuple[int, int]] = {}
        for index, (name, work) in enumerate(candidates.items()):
            tell(f"warm up {name}", 0.2 * index / len(candidates))
            blocks[name] = _warm_up(work, warmup_seconds)
        times = _rounds(candidates, {n: b[1] for n, b in blocks.items()}, seconds, min_rounds, tell)
    return {
        name: Timing(
            name=name,
            seconds=tuple(times[name]),
            calls_per_round=blocks[name][1],
            warmup_calls=blocks[name][0],
            threads=count,
            images=images if isinstance(images, int) else images[name],
        )
        for name in candidates
    }


def _silent(step: str, done: float) -> None:
    """Ignore a step."""


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    """Set the number of CPU threads inside an operator, and set it back."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads} is not a positive integer")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _block(work: Work, calls: int) -> float:
    """Return the mean seconds of a call."""
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


def _warm_up(work: Work, limit: float) -> tuple[int, int]:
    """Call until two windows of five calls have medians within 5%, or the limit in seconds is reached.

    Returns:
        Calls made, and the calls of a block of at least a millisecond.
    """
    times = [_block(work, 1)]
    end = time.perf_counter() + limit
    while time.perf_counter() < end and not _stable(times):
        times.append(_block(work, 1))
    return len(times), max(1, math.ceil(BLOCK_SECONDS / max(min(times), 1e-9)))


def _stable(times: list[float]) -> bool:
    if len(times) < 2 * WARMUP_CALLS:
        return False
    before, now = np.median(times[-2 * WARMUP_CALLS : -WARMUP_CALLS]), np.median(times[-WARMUP_CALLS:])
    return bool(abs(now / before - 1) < STABLE)


def _rounds(
    candidates: Mapping[str, Work], calls: Mapping[str, int], seconds: float, min_rounds: int, tell: Progress
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    budget, spent, rounds = seconds * len(candidates), 0.0, 0
    while rounds < min_rounds or spent < budget:
        for name, work in candidates.items():
            tell(f"time {name}", 0.2 + 0.8 * min(1.0, min(spent / budget, rounds / min_rounds)))
            times[name].append(_block(work, calls[name]))
            spent += times[name][-1] * calls[name]
        rounds += 1
    tell("done", 1.0)
    return times
