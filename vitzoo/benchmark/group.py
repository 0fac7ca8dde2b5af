"""One group of cases, timed side by side: the rows of one combination of settings."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vitzoo.benchmark.case import Case, Measure, Unsupported
from vitzoo.benchmark.models import build, describe
from vitzoo.benchmark.results import Row, passes_of
from vitzoo.benchmark.runtimes import check, file_mib, with_file
from vitzoo.benchmark.statistics import ratio_of_passes
from vitzoo.benchmark.subject import Subject, prepare
from vitzoo.benchmark.timing import BLOCK_SECONDS, Progress, Timing, compare_blocks, cpu_threads
from vitzoo.benchmark.worker import Nursery, Worker, WorkerError

# raw samples kept in a row: beyond this every second, third, ... round is
MAX_SAMPLES = 1000
# on an accelerator calls are queued: latency waits for each, throughput for a block of this many seconds
QUEUED_SECONDS = 0.05

Size = tuple[int, int, int]


def run_group(
    cases: list[Case], base: int, how: Measure, folder: Path, nurseries: Sequence[Nursery], tell: Progress
) -> list[Row]:
    """Measure cases side by side.

    Args:
        cases: all of one setting, labels all different.
        base: index of the case that ratios are to.
        how: how.
        folder: for exported files, which later groups use again.
        nurseries: where the processes come from, one a pass.
        tell: told the present step and the share of the group that is done.

    Returns:
        One row a case, in order; a case that failed has "error" and "error_kind".
    """
    group = _Group(cases, how, folder, nurseries, tell)
    try:
        group.describe()
        group.time()
        group.measure_memory()
    finally:
        group.close()
    if "samples_s" in group.rows[base]:
        for row in group.rows:
            _add_ratio(row, group.rows[base], group.names[base], how.confidence)
    return [_thinned(row) for row in group.rows]


class _Group:
    def __init__(
        self, cases: list[Case], how: Measure, folder: Path, nurseries: Sequence[Nursery], tell: Progress
    ) -> None:
        # a process of its own is to use as many threads as this one would
        self.cases = [replace(case, threads=case.threads or torch.get_num_threads()) for case in cases]
        self.how, self.folder, self.tell, self.nurseries = how, folder, tell, nurseries
        self.names = [case.name for case in cases]
        self.rows = [settings_of(case) for case in self.cases]
        self.sizes: list[Size | None] = [None] * len(cases)
        self.subjects: dict[str, Subject | Worker] = {}
        self.calls: dict[float, dict[str, int]] = {}  # by seconds of a block

    def describe(self) -> None:
        """Count what every case computes, and write the files that runtimes read."""
        for i, case in enumerate(self.cases):
            self.tell(f"describe {case.name}", 0.1 * i / len(self.cases))
            with failures_in(self.rows[i]):
                check(case)
                facts, size = describe(case)
                self.rows[i] |= facts
                self.rows[i][f"{case.mode}_img_size"] = _side(size)
                self.cases[i] = with_file(case, build, size, self.folder)
                self.sizes[i] = size
                file = self.cases[i].file
                if (
                    case.dtype == "int8" and file is not None
                ):  # described is the float32 model it was made from
                    self.rows[i]["weight_mib"] = round(file_mib(file), 3)

    def time(self) -> None:
        """Time those that work in interleaved rounds, in every pass anew."""
        begin = time.perf_counter()
        passes, share = [], 0.75 / self.how.passes
        for number in range(self.how.passes):
            self._build(self.nurseries[number], 0.1 + share * number, 0.3 * share)
            passes.append(self._time(0.1 + share * (number + 0.3), 0.7 * share))
            self.close()
        seconds = time.perf_counter() - begin
        for row, name in zip(self.rows, self.names, strict=True):
            if "error" not in row:
                row |= figures([timed[name] for timed in passes], row["mode"])
                row["run_seconds"] = round(seconds, 3)

    def _build(self, nursery: Nursery, start: float, share: float) -> None:
        """Build every case that has not failed and call it once."""
        todo = [i for i, row in enumerate(self.rows) if "error" not in row]
        for done, i in enumerate(todo):
            case, size = self.cases[i], self.sizes[i]
            assert size is not None
            self.tell(f"build {case.name}", start + share * done / len(todo))
            with failures_in(self.rows[i]), cpu_threads(case.threads):
                if self.how.isolate or self.how.passes > 1:
                    self.subjects[case.name] = worker = Worker(nursery)
                    worker.prepare(case, size)
                else:
                    self.subjects[case.name] = prepare(case, size)
                self.rows[i] |= self.subjects[case.name].facts

    def _time(self, start: float, share: float) -> dict[str, tuple[Timing, Timing]]:
        """Return latency and throughput of those that work."""
        queued = self.cases[0].device.startswith("cuda")
        latency = self._compare(0.0 if queued else BLOCK_SECONDS, start, share * (0.5 if queued else 1.0))
        throughput = latency
        if queued:
            throughput = self._compare(QUEUED_SECONDS, start + 0.5 * share, 0.5 * share)
        return {name: (latency[name], found) for name, found in throughput.items()}

    def _compare(self, block_seconds: float, start: float, share: float) -> dict[str, Timing]:
        working = {
            n: self.subjects[n] for n, row in zip(self.names, self.rows, strict=True) if "error" not in row
        }
        if not working:
            return {}
        failed: dict[str, Exception] = {}
        timings = compare_blocks(
            {name: subject.block for name, subject in working.items()},
            seconds=self.how.seconds / self.how.passes,
            min_rounds=math.ceil(self.how.min_rounds / self.how.passes),
            warmup_seconds=self.how.warmup_seconds,
            block_seconds=block_seconds,
            calls=self.calls.setdefault(block_seconds, {}),
            threads=self.cases[0].threads,
            images=self.cases[0].batch_size,
            progress=lambda step, done: self.tell(step, start + share * done),
            failed=failed,
        )
        self.calls[block_seconds] |= {name: timing.calls_per_round for name, timing in timings.items()}
        for name, error in failed.items():
            set_error(self.rows[self.names.index(name)], error)
        return timings

    def measure_memory(self) -> None:
        """Find the peak memory of each case that worked, each in a process of its own."""
        if not self.how.memory:
            return
        for i, (case, size) in enumerate(zip(self.cases, self.sizes, strict=True)):
            row = self.rows[i]
            if "error" in row or size is None:
                continue
            self.tell(f"memory of {case.name}", 0.85 + 0.15 * i / len(self.cases))
            row["peak_mem_of"] = "CUDA allocator" if case.device.startswith("cuda") else "resident set"
            try:
                row["peak_mem_mib"] = round(self.nurseries[0].peak_memory(case, size), 2)
            except WorkerError as error:
                row["peak_mem_mib"], row["peak_mem_error"] = None, f"{error.kind}: {error}"

    def close(self) -> None:
        """Let the models go, and end their processes."""
        for subject in self.subjects.values():
            subject.close()
        self.subjects = {}


def _side(size: Size) -> int | list[int]:
    return size[1] if size[1] == size[2] else [size[1], size[2]]


def settings_of(case: Case) -> Row:
    """Return the fields of a row that say what was asked for."""
    tag = "" if case.is_file else case.model.partition(".")[2]
    return {
        "model": case.model,
        "label": case.name,
        "tag": tag or None,
        "mode": case.mode,
        "runtime": case.runtime,
        "precision": case.dtype,
        "layout": case.memory_format,
        "attention": case.attention,
        "device": case.device,
        "threads": case.threads,
        "requested_img_size": list(case.img_size) if isinstance(case.img_size, tuple) else case.img_size,
        "requested_batch_size": case.batch_size,
        f"{case.mode}_batch_size": case.batch_size,
        "kwargs": dict(case.kwargs),
    }


@contextlib.contextmanager
def failures_in(row: Row) -> Iterator[None]:
    """Write a failure of the block into a row, so that the other cases are still measured."""
    try:
        yield
    except Exception as error:
        set_error(row, error)


def set_error(row: Row, error: Exception) -> None:
    """Write what went wrong into a row, and which kind it is: out of memory, unsupported, missing package, failed."""
    kind = error.kind if isinstance(error, WorkerError) else type(error).__name__
    text = str(error)
    row["error"] = f"{kind}: {text}"
    if kind in ("MemoryError", "OutOfMemoryError") or "not enough memory" in text or "can't allocate" in text:
        row["error_kind"] = "out of memory"
    elif isinstance(error, Unsupported) or kind == Unsupported.__name__:
        row["error_kind"] = "unsupported"
    elif kind in ("ImportError", "ModuleNotFoundError"):
        row["error_kind"] = "missing package"
    else:
        row["error_kind"] = "failed"


def figures(passes: Sequence[tuple[Timing, Timing]], mode: str) -> Row:
    """Return the fields of a row that timing gives: timm's names, milliseconds, and the raw samples.

    Args:
        passes: latency and throughput of each pass.
        mode: of the case.
    """
    latency, throughput = (functools.reduce(Timing.then, several) for several in zip(*passes, strict=True))
    return {
        f"{mode}_samples_per_sec": _short(throughput.images_per_second),
        f"{mode}_step_time": _short(1e3 * throughput.median),
        "iqr_ms": _short(1e3 * latency.iqr),
        **{f"p{p}_ms": _short(1e3 * latency.percentile(p)) for p in (50, 90, 99)},
        "passes": len(passes),
        "rounds": len(latency.seconds),
        "calls_per_round": latency.calls_per_round,
        "n_iter": len(latency.seconds) * latency.calls_per_round,
        "n_warmup": latency.warmup_calls,
        "threads": latency.threads,
        "samples_s": list(throughput.seconds),
        "samples_passes": [len(timing.seconds) for _, timing in passes],
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _add_ratio(row: Row, base: Row, name: str, confidence: float) -> None:
    if "samples_s" not in row:
        return
    ratio = ratio_of_passes(passes_of(base), passes_of(row), confidence, paired=True)
    ends = [None if math.isnan(end) else _short(end) for end in (ratio.low, ratio.high)]
    row |= {"ratio": _short(ratio.value), "ratio_low": ends[0], "ratio_high": ends[1], "ratio_to": name}


def _thinned(row: Row) -> Row:
    """Keep about `MAX_SAMPLES` samples at most, evenly spread over the rounds of each pass."""
    if "samples_s" in row:
        every = -(-len(row["samples_s"]) // MAX_SAMPLES)
        kept = [[_short(seconds) for seconds in samples[::every]] for samples in passes_of(row)]
        row["samples_s"] = [seconds for samples in kept for seconds in samples]
        row["samples_passes"] = [len(samples) for samples in kept]
        row["samples_every"] = every
    return row
