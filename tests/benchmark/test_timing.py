"""Timing: interleaved rounds find a slower candidate, and statistics are those of the rounds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.timing import Timing, compare, compare_blocks


def test_a_call_longer_than_the_warm_up_is_made_once() -> None:
    timings = compare({"slow": lambda: time.sleep(0.03)}, seconds=0.01, min_rounds=1, warmup_seconds=0.02)
    assert timings["slow"].warmup_calls == 1


def test_rounds_are_interleaved_and_ratios_found() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    timings = compare({"a": work("a", 0.002), "b": work("b", 0.006)}, seconds=0.1, warmup_seconds=0.05)
    counted = "".join(calls)[timings["a"].warmup_calls + timings["b"].warmup_calls :]
    assert counted == "ab" * len(timings["a"].seconds)
    assert 2 < timings["a"].ratio_to(timings["b"]) < 4


def test_statistics_are_those_of_the_rounds() -> None:
    seconds = (0.4, 0.1, 0.2, 0.3, 0.5)
    timing = Timing("a", seconds, calls_per_round=1, warmup_calls=0, threads=1, images=8)
    assert timing.median == pytest.approx(0.3)
    assert timing.iqr == pytest.approx(np.subtract(*np.percentile(seconds, [75, 25])))
    assert timing.percentile(90) == pytest.approx(np.percentile(seconds, 90))
    assert timing.images_per_second == pytest.approx(8 / 0.3)


def test_threads_are_set_and_restored() -> None:
    before, seen = torch.get_num_threads(), set()
    compare({"a": lambda: seen.add(torch.get_num_threads())}, seconds=0.01, warmup_seconds=0.01, threads=1)
    assert seen == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"seconds": 0}, "seconds 0"), ({"min_rounds": -1}, "min_rounds -1"), ({"threads": 0}, "threads 0")],
    ids=str,
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare({"a": lambda: None}, **kwargs)
    with pytest.raises(ValueError, match="nothing to time"):
        compare({})


def test_a_candidate_that_fails_leaves_the_others() -> None:
    left, failed = iter(range(20)), {}
    blocks = {"good": lambda calls: 0.001, "bad": lambda calls: 0.001 if next(left) < 15 else 1 / 0}
    timings = compare_blocks(blocks, seconds=0.03, min_rounds=10, warmup_seconds=1, failed=failed)
    assert list(timings) == ["good"]
    assert len(timings["good"].seconds) >= 20
    assert isinstance(failed["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        compare_blocks({"bad": lambda calls: 1 / 0})


def test_warm_up_goes_on_until_times_are_stable() -> None:
    times = iter([0.9, 0.7, 0.5, 0.3, 0.2, 0.1])
    blocks = {"cold": lambda calls: next(times, 0.1)}
    timing = compare_blocks(blocks, seconds=0.1, min_rounds=3, warmup_seconds=5)["cold"]
    assert timing.warmup_calls > 10
    assert set(timing.seconds) == {0.1}


@pytest.mark.parametrize(("block_seconds", "calls"), [(0.0, 1), (0.01, 10)])
def test_calls_of_a_block(block_seconds: float, calls: int) -> None:
    timing = compare_blocks({"a": lambda calls: 0.001}, seconds=0.1, block_seconds=block_seconds)["a"]
    assert timing.calls_per_round == calls


def test_machine_record() -> None:
    record = machine()
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["cpu"]["usable_cores"] >= 1
    assert "T" in record["time"]
