"""`vitzoo.benchmark(...)`: models side by side, over sweeps of settings, into rows."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitzoo.benchmark.case import Case, ImgSize, Measure, Models, subjects_of, sweep
from vitzoo.benchmark.group import run_group
from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.results import SCHEMA_VERSION, Recorder, Results, Row
from vitzoo.benchmark.timing import Progress
from vitzoo.benchmark.worker import Nursery


def benchmark(
    models: Models,
    *,
    batch_size: int | list[int] = 1,
    img_size: ImgSize | list[ImgSize | None] | None = None,
    threads: int | list[int | None] | None = None,
    dtype: str | list[str] = "float32",
    memory_format: str | list[str] = "contiguous",
    runtime: str | list[str] = "eager",
    mode: str | list[str] = "infer",
    attention: str | list[str] = "default",
    device: str = "cpu",
    kwargs: Mapping[str, Any] | None = None,
    against: str | nn.Module | Sequence[str | nn.Module] = (),
    seconds: float = 2.0,
    min_rounds: int = 10,
    warmup_seconds: float = 2.0,
    memory: bool = True,
    isolate: bool = False,
    passes: int = 1,
    confidence: float = 0.99,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Measure models side by side: throughput, latency, memory, multiply-accumulates, kernels used.

    Every setting given as a list is swept over. For each combination all models are timed in interleaved rounds
    A B C A B C, so that a slow moment of the machine hits all alike.

    Args:
        models: a name or module, several, or label -> name or module. Names are those of vitzoo and timm,
            `timm:NAME`, `layer:NAME` (see `vitzoo.benchmark.layers`) or a path `FILE.onnx`.
        batch_size: images a call; never made smaller, what does not fit is an error in its row.
        img_size: side or (H, W) in pixels; each model's own if None.
        threads: CPU threads inside an operator; PyTorch's number if None.
        dtype: of weights and input: float32, bfloat16, float16, int8.
        memory_format: contiguous or channels_last.
        runtime: eager, compiled, onnxruntime or openvino. ONNX files run in onnxruntime unless openvino is asked for.
        mode: infer, or train: forward, backward and a step of SGD.
        attention: default, or matrix: form the attention matrix.
        device: cpu or cuda.
        kwargs: constructor arguments of every model in `models`, not of those in `against`.
        against: baselines, measured beside the models; ratios in the rows are to the first of them, or to the first
            model if there is none.
        seconds: time spent on each model and setting after its warm-up.
        min_rounds: rounds at least.
        warmup_seconds: bound on each warm-up, which ends before when times are stable.
        memory: measure peak memory, each case in a fresh process, a few seconds each.
        isolate: give every case a process of its own for the timing too.
        passes: times that timing begins anew, from two on every time in fresh processes, among which `seconds` and
            `min_rounds` are divided; intervals of ratios then know what differs from process to process.
        confidence: of the intervals of ratios.
        output: JSON Lines file to write row by row.
        force: replace the output if it exists.
        progress: told the present step and the share of the whole that is done.

    Returns:
        Header and rows. A model that fails has a row whose "error" says why; the others are measured all the same.

    Raises:
        UnknownModelError, FileNotFoundError: a model that does not exist; nothing is measured then.
        ValueError: settings that make no sense.
        OSError: an output that exists or cannot be written; nothing is measured then.
    """
    how = Measure(seconds, min_rounds, warmup_seconds, memory, isolate, passes, confidence)
    baselines = subjects_of(against)
    subjects = subjects_of(models)
    if not subjects:
        raise ValueError("there is no model to measure")
    axes = dict(
        mode=mode,
        runtime=runtime,
        attention=attention,
        dtype=dtype,
        memory_format=memory_format,
        threads=threads,
        img_size=img_size,
        batch_size=batch_size,
        device=device,
    )
    groups = sweep(unique([*(replace(s, kwargs=kwargs or {}) for s in subjects), *baselines]), **axes)
    base = len(subjects) if baselines else 0
    return run_groups([Group(cases, base, how) for cases in groups], how, output, force, progress)


def unique(subjects: list[Case]) -> list[Case]:
    """Number the labels of subjects that would be called alike."""
    names = [subject.name for subject in subjects]
    return [
        replace(s, label=f"{s.name} #{names[: i + 1].count(s.name)}") if names.count(s.name) > 1 else s
        for i, s in enumerate(subjects)
    ]


def header(**more: Any) -> Row:
    """Return the first row of a result file: where its rows were found, and as `more` says, how."""
    return {
        "kind": "header",
        "schema_version": SCHEMA_VERSION,
        "run": uuid.uuid4().hex[:12],
        "machine": machine(),
        **more,
    }


def stamp(head: Row, kind: str = "result") -> Row:
    """Return what every other row begins with."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"kind": kind, "schema_version": SCHEMA_VERSION, "run": head["run"], "time": now}


@dataclass(frozen=True)
class Group:
    """Cases to be timed side by side.

    Attributes:
        cases: labels all different.
        base: index of the one that ratios are to.
        how: how they are measured.
        comparison: what the rows say they belong to, if anything.
        judge: called with the finished rows and the confidence, returns claim rows.
    """

    cases: list[Case]
    base: int
    how: Measure
    comparison: str | None = None
    judge: Callable[[Sequence[Row], float], list[Row]] | None = None


def run_groups(
    groups: Sequence[Group],
    how: Measure,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> Results:
    """Measure groups of cases one after another.

    Args:
        groups: what to measure.
        how: how, for the header.
        output: as for `benchmark`; so are `force` and `progress`.
        force: replace the output if it exists.
        progress: told the present step and the share of the whole that is done.
        more: fields of the header.

    Returns:
        Header and rows.

    Raises:
        UnknownModelError, FileNotFoundError, ValueError, OSError: as `benchmark`.
    """
    for group in groups:
        for case in group.cases:
            case.check_model()
    tell = progress or (lambda step, done: None)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(output, force))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="vitzoo-bench-"))
        nurseries = [stack.enter_context(Nursery()) for _ in range(how.passes)]
        results = Results(header(measure=asdict(how), **more))
        recorder.write(results.header)
        for index, group in enumerate(groups):

            def told(step: str, done: float, index: int = index) -> None:
                tell(f"{index + 1}/{len(groups)} {step}", (index + done) / len(groups))

            rows = run_group(group.cases, group.base, group.how, Path(scratch), nurseries, told)
            claims = group.judge(rows, group.how.confidence) if group.judge else []
            more_of_row = {"comparison": group.comparison} if group.comparison else {}
            for found, into in ((rows, results.rows), (claims, results.claims)):
                for row in found:
                    into.append({**stamp(results.header), **more_of_row, **row})
                    recorder.write(into[-1])
    return results
