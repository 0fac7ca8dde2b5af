"""Timing: interleaved rounds find a slower candidate, and statistics are those of the rounds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.models import BenchSettings, benchmark_models
from vitzoo.benchmark.timing import Timing, compare


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


def test_model_rows_have_timms_keys() -> None:
    settings = BenchSettings(2, 32, seconds=0.05, kwargs={"depth": 1})
    good, bad = benchmark_models(["vim_tiny_patch16_224", "cvt_13"], settings)
    assert good["infer_batch_size"] == 2
    assert good["infer_img_size"] == 32
    assert good["infer_samples_per_sec"] == pytest.approx(2e3 / good["infer_step_time"])
    assert good["param_count"] > 0
    assert "depth" in bad["error"]


def test_machine_record() -> None:
    record = machine()
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["cpu"]["usable_cores"] >= 1
    assert "T" in record["time"]
