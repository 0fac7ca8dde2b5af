r"""Time scans that are divided along their tokens beside the same scans undivided, interleaved, on the CPU.

    python benchmarks/divided_scans.py --output benchmarks/results/divided_scans_CPU_ISA.json

What is divided depends on the shape alone (`vitzoo.kernels.common.scan_support`), so that one thread, and two that both
have work without it, pay for what idle ones gain: all three are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from operator_cases import forced, forward_call, shapes_and_inputs, train_call
from run_kernels import summary, surroundings

import vitzoo
from vitzoo.benchmark.timing import compare
from vitzoo.export.files import write_text
from vitzoo.kernels.common import scan_support

PASSES = {"forward": forward_call, "forward+backward": train_call}
# operator, label, changes to that shape of inputs.py; the last has work for both of two cores undivided
CASES: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("selective_scan", "few_channels", {}),
    ("bidirectional_selective_scan", "few_channels", {}),
    ("cross_selective_scan", "few_channels", {}),
    ("cross_selective_scan", "few_channels", {"dstate": 1}),
    ("cross_selective_scan", "vmamba_tiny_stage1", {"batch": 1}),
)


def undivided(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call with no sequence long enough to be divided."""

    def run() -> None:
        with mock.patch.object(scan_support, "LONG", sys.maxsize):
            call()

    return run


def measure(
    name: str, label: str, changes: dict[str, int], threads: list[int], seconds: float
) -> list[dict[str, Any]]:
    """Return a row a pass and number of threads."""
    shapes, make_inputs = shapes_and_inputs(name)
    shape = dataclasses.replace(shapes[label], **changes)
    inputs = make_inputs(shape)
    rows = []
    for kind, bind in PASSES.items():
        call = bind(forced(getattr(vitzoo.kernels, name), "cpu"), inputs)
        runs = {"divided": call, "whole": undivided(call)}
        for count in threads:
            times = compare(runs, seconds=seconds, min_rounds=15, threads=count)
            row = {"operator": name, "sizes": vars(shape), "pass": kind, "threads": count}
            row["ratio"] = times["divided"].ratio_to(times["whole"])
            row["times"] = {which: summary(timing) for which, timing in times.items()}
            rows.append(row)
            ms = {which: round(found["median_ms"], 3) for which, found in row["times"].items()}
            print(name, vars(shape), kind, f"{count} threads", ms, f"{row['ratio']:.2f}x", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each candidate")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    results = [row for case in CASES for row in measure(*case, args.threads, args.seconds)]
    if args.output is not None:
        write_text(args.output, json.dumps({"machine": surroundings(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
