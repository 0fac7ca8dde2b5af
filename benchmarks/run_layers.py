"""Time layers that are built on the operators against other formulations and layers of equal width, interleaved.

    python benchmarks/run_layers.py --threads 2 --output benchmarks/results/layers.json

HiLo (LITv2-S's stage 3: C 384, 12 heads, window 2, alpha 0.9) against the authors' formulation of it in torch
operations, whose output must be the same, and against timm's layers of equal width and head count: PVT's
spatial-reduction attention and Swin's window attention with its partition and merge. Projections are part of every
layer.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from layer_cases import DIM, HEADS, HILO_SIZES, hilo
from run_kernels import SECONDS, summary, surroundings

from vitzoo.benchmark.timing import compare
from vitzoo.testing import relative_difference


def measure(side: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Check that the two formulations of HiLo agree, then time all layers without gradients."""
    calls = hilo(side)
    x = torch.randn(batch, side * side, DIM)
    with torch.inference_mode():
        difference = relative_difference(calls["hilo"](x), calls["authors"](x))
        if not difference < 1e-5:
            raise AssertionError(f"HiLo differs from the authors' formulation by {difference:.1e}")
        timed = {name: functools.partial(call, x) for name, call in calls.items()}
        times = compare(timed, seconds=SECONDS, min_rounds=rounds)
    rows = []
    for baseline in list(calls)[1:]:
        ratio = times["hilo"].ratio_to(times[baseline])
        row = {"layer": "hilo", "dim": DIM, "heads": HEADS, "side": side, "batch": batch, "dtype": "float32"}
        pair = {which: summary(times[which]) for which in ("hilo", baseline)}
        rows.append(row | {"pass": "forward", "baseline": baseline, "ratio": ratio, "times": pair})
        print(
            f"hilo {side}x{side} batch {batch}: {1e3 * times['hilo'].median:8.2f} ms, {baseline} "
            f"{1e3 * times[baseline].median:8.2f} ms, {ratio:5.2f}x",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and, at 14x14, 8")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for side in dict.fromkeys(side for side, _ in HILO_SIZES):
        for batch in args.batch or [batch for of, batch in HILO_SIZES if of == side]:
            rows += measure(side, batch, args.rounds)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": surroundings(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
