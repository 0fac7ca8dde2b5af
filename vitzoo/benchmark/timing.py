"""Time callables side by side: warm-up until stable, interleaved rounds, medians and their spread.

On a machine that others use too, one measurement after another compares the neighbours' load. Here every
round calls each candidate once, in turn, so that a slow moment hits all alike and ratios survive it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the accelerator, if there is one

from vitzoo.stack import with_room

Work = Callable[[], Any]
Block = Callable[[int], float]  # makes that many calls in a row, returns the mean seconds of one
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

    def then(self, later: Timing) -> Timing:
        """Return the times of this and a later timing as one.

        Raises:
            ValueError: their blocks have different numbers of calls, so that their times differ in kind.
        """
        if later.calls_per_round != self.calls_per_round:
            raise ValueError(
                f"blocks of {self.calls_per_round} and {later.calls_per_round} calls do not add up"
            )
        warmup = self.warmup_calls + later.warmup_calls
        return replace(self, seconds=self.seconds + later.seconds, warmup_calls=warmup)

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
    return compare_blocks(
        {name: functools.partial(run_block, work) for name, work in candidates.items()},
        seconds=seconds,
        min_rounds=min_rounds,
        warmup_seconds=warmup_seconds,
        threads=threads,
        images=images,
        progress=progress,
    )


def compare_blocks(
    candidates: Mapping[str, Block],
    *,
    seconds: float = 2.0,
    min_rounds: int = 10,
    warmup_seconds: float = 2.0,
    block_seconds: float = BLOCK_SECONDS,
    calls: Mapping[str, int] | None = None,
    threads: int | None = None,
    images: int | Mapping[str, int] = 1,
    progress: Progress | None = None,
    failed: dict[str, Exception] | None = None,
) -> dict[str, Timing]:
    """Time candidates that may live in other processes in interleaved rounds; `compare` for those that may not.

    Args:
        candidates: name -> what makes a number of calls and returns the mean seconds of one.
        seconds: time to spend on each, warm-up not included.
        min_rounds: rounds at least, however long they take.
        warmup_seconds: bound on the warm-up of each; it ends before when the times are stable.
        block_seconds: calls are timed in blocks of at least this; 0 times every call by itself.
        calls: the calls of a block, name -> number, as an earlier timing found them.
        threads: CPU threads inside an operator while timing; PyTorch's number if None.
        images: images a call processes, one number or one a candidate.
        progress: told the present step and the share of the whole that is done.
        failed: given a dictionary, a candidate that raises is left out of further rounds and its error put
            there, and the others are timed all the same.

    Returns:
        name -> times, in the order given, of those that did not fail.

    Raises:
        ValueError: no candidate, or a number that makes no sense.
        Exception: whatever a candidate raises, unless `failed` takes it.
    """
    if not candidates:
        raise ValueError("there is nothing to time")
    for what, value in (("seconds", seconds), ("min_rounds", min_rounds)):
        if value <= 0:
            raise ValueError(f"{what} {value} is not positive")
    with cpu_threads(threads) as count:
        rounds = _Rounds(candidates, progress or _silent, failed)
        rounds.warm_up(warmup_seconds, block_seconds, calls or {})
        rounds.run(seconds, min_rounds)
    return {
        name: Timing(
            name=name,
            seconds=tuple(times),
            calls_per_round=rounds.calls[name],
            warmup_calls=rounds.warmup_calls[name],
            threads=count,
            images=images if isinstance(images, int) else images[name],
        )
        for name, times in rounds.times.items()
    }


@with_room  # or what a model takes depends on how deep in the caller's stack it is timed
def run_block(work: Work, calls: int) -> float:
    """Make calls in a row and return the mean seconds of one; an accelerator is waited for at both ends."""
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


class _Rounds:
    """The candidates still in the race and their times, all of the same rounds."""

    def __init__(
        self, candidates: Mapping[str, Block], tell: Progress, failed: dict[str, Exception] | None
    ) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in candidates}
        self.calls: dict[str, int] = {}
        self.warmup_calls: dict[str, int] = {}
        self._blocks, self._tell, self._failed = candidates, tell, failed

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._failed is None:
                raise
            self._failed[name] = error
            del self.times[name]

    def warm_up(self, limit: float, block_seconds: float, calls: Mapping[str, int]) -> None:
        """Call each until two windows of five calls have medians within 5%, or for the limit in seconds."""
        for index, name in enumerate(list(self.times)):
            self._tell(f"warm up {name}", 0.2 * index / len(self._blocks))
            with self._dropping(name):
                end = time.perf_counter() + limit
                times = [self._blocks[name](1)]
                while time.perf_counter() < end and not _stable(times):
                    times.append(self._blocks[name](1))
                self.warmup_calls[name] = len(times)
                self.calls[name] = calls.get(name) or max(1, math.ceil(block_seconds / max(min(times), 1e-9)))

    def run(self, seconds: float, min_rounds: int) -> None:
        """Call each in turn until the mean candidate has had its seconds, and the rounds are enough."""
        spent, rounds = 0.0, 0
        while self.times and (rounds < min_rounds or spent < seconds * len(self.times)):
            for name in list(self.times):
                done = min(1.0, min(spent / (seconds * len(self.times)), rounds / min_rounds))
                self._tell(f"time {name}", 0.2 + 0.8 * done)
                with self._dropping(name):
                    self.times[name].append(self._blocks[name](self.calls[name]))
                    spent += self.times[name][-1] * self.calls[name]
            rounds += 1
        self._tell("done", 1.0)


def _stable(times: list[float]) -> bool:
    if len(times) < 2 * WARMUP_CALLS:
        return False
    before, now = np.median(times[-2 * WARMUP_CALLS : -WARMUP_CALLS]), np.median(times[-WARMUP_CALLS:])
    return bool(abs(now / before - 1) < STABLE)


def _silent(step: str, done: float) -> None:
    """Ignore a step."""


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[int]:
    """Set the number of CPU threads inside an operator, None for what it is, and set it back.

    Raises:
        ValueError: a number below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads} is not a positive integer")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
