"""Time every operator's backends against its plain PyTorch reference, interleaved in one run.

    python benchmarks/run_kernels.py --threads 2 --output benchmarks/results/kernels.json

A shape is timed only after its output and gradients have been compared with the float64 reference. The baseline of the
backward pass is autograd through the reference. Where an operator's inputs.py knows a floor of its forward pass, work
that no implementation on the CPU can do without, that is timed in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from operator_cases import backends, candidates, check, floor, passes, shapes_and_inputs

from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.timing import Timing, compare
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import operators

SECONDS = 1.0  # of timing for each candidate, warm-up not included


def surroundings() -> dict[str, Any]:
    """Return what a reader needs to repeat the measurement."""
    return {**machine(), "isa": native.cpu_isa(), "vnni": native.cpu_vnni()}


def summary(timing: Timing) -> dict[str, float]:
    """Return median, quartiles and least time of a call in ms."""
    quartiles = {f"q{i}_ms": 1e3 * timing.percentile(25 * i) for i in (1, 3)}
    least = 1e3 * min(timing.seconds)
    rounds = len(timing.seconds)
    return {"median_ms": 1e3 * timing.median, **quartiles, "min_ms": least, "rounds": rounds}


def measure(name: str, label: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Check and time one operator at one shape with every backend that runs here, against every baseline."""
    shapes, make_inputs = shapes_and_inputs(name)
    inputs, kinds, ours = make_inputs(shapes[label], dtype), passes(name), backends(name)
    for backend in ours:
        check(name, backend, inputs, differentiable=len(kinds) > 1)
    rows = []
    for kind in kinds:
        calls = candidates(name, kind, inputs)
        against = [candidate for candidate in calls if candidate not in ours]
        least = floor(name, shapes[label]) if kind == "forward" else None
        if least is not None and "cpu" in ours:
            calls["floor"] = least
        times = compare(calls, seconds=SECONDS, min_rounds=rounds)
        for backend, baseline in itertools.product(ours, against):
            ratio = times[backend].ratio_to(times[baseline])
            row = {"operator": name, "shape": label, "sizes": vars(shapes[label])}
            row |= {"dtype": str(dtype).removeprefix("torch."), "pass": kind, "backend": backend}
            pair = {which: summary(times[which]) for which in (backend, baseline)}
            above = ""
            if backend == "cpu" and "floor" in calls:
                row["times_floor"] = times["floor"].ratio_to(times[backend])
                pair["floor"] = summary(times["floor"])
                above = f", {row['times_floor']:.2f} times the floor"
            rows.append(row | {"baseline": baseline, "ratio": ratio, "times": pair})
            print(
                f"{name:16} {label:20} {row['dtype']:9} {kind:17} {backend:5} "
                f"{1e3 * times[backend].median:9.2f} ms, {baseline} {1e3 * times[baseline].median:9.2f} ms, "
                f"{ratio:5.1f}x{above}",
                file=sys.stderr,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operator", action="append", help="default: every operator")
    parser.add_argument(
        "--shape", action="append", help="default: every shape of the operator's MODEL_SHAPES"
    )
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.operator or sorted(operators):
        shapes, _ = shapes_and_inputs(name)
        for label in args.shape or shapes:
            for dtype in args.dtype or ["float32"]:
                rows += measure(name, label, getattr(torch, dtype), args.rounds)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": surroundings(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
