r"""Time what `vitzoo.convert_int8` makes of a model beside the float32 model in PyTorch, interleaved.

    python benchmarks/int8_modules.py deit_small_patch16_224 vim_tiny_patch16_224 \
        --output benchmarks/results/int8_modules_CPU_ISA.json

Weights and images are those of `benchmarks/quantization.py`. A model's rows replace those that the output file has.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from quantization import CALIBRATION, HELD_BACK, crops, filled, write_results
from run_kernels import summary, surroundings

import vitzoo
from vitzoo.benchmark.timing import compare
from vitzoo.deploy import torch_coverage
from vitzoo.testing import relative_difference


@torch.inference_mode()
def measure(
    name: str, recipes: list[str], threads: list[int], batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Return a row a recipe and number of threads."""
    model = filled(name)
    calibration, held_back = crops(model, CALIBRATION, 0).split(8), crops(model, HELD_BACK, 1)
    x = held_back[torch.arange(batch) % len(held_back)]
    made = {r: vitzoo.convert_int8(model, vitzoo.quantize(model, r, calibration)) for r in recipes}
    exact = model(held_back)
    facts = {
        recipe: {
            "coverage": torch_coverage(int8, int8.input_size).share,
            "logit_error": relative_difference(int8(held_back), exact),
        }
        for recipe, int8 in made.items()
    }
    rows = []
    for count in threads:
        runs = {kind: functools.partial(run, x) for kind, run in {"float32": model, **made}.items()}
        times = compare(runs, seconds=seconds, min_rounds=7, threads=count, images=batch)
        for recipe in recipes:
            row = {"model": name, "recipe": recipe, "batch": batch, "threads": count, **facts[recipe]}
            row["speed"] = times[recipe].ratio_to(times["float32"])
            row["times"] = {kind: summary(times[kind]) for kind in (recipe, "float32")}
            rows.append(row)
            shown = {key: round(row[key], 4) for key in ("speed", "coverage", "logit_error")}
            ms = {kind: round(found["median_ms"], 1) for kind, found in row["times"].items()}
            print(name, f"{count} threads", ms, shown, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["deit_small_patch16_224"])
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w8a8_dynamic"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each candidate")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    results = [
        row
        for name in args.models
        for row in measure(name, args.recipes, args.threads, args.batch, args.seconds)
    ]
    if args.output is not None:
        write_results(args.output, results, ("model",), machine=surroundings())


if __name__ == "__main__":
    main()
