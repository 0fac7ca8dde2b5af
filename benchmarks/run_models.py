"""Measure models in interleaved rounds and write rows, machine and settings as one JSON file.

    python benchmarks/run_models.py vim_tiny_patch16_224 deit_tiny_patch16_224 --threads 2 -o results/models.json

The file is written when all is measured, under another name first, so that none is ever half there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.models import BenchSettings, benchmark_models


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch-size", "-b", type=int, default=1, help="images a call, never made smaller")
    parser.add_argument(
        "--img-size", type=int, default=None, help="side in pixels; each model's own if absent"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=5.0, help="on each model, after its warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", "-o", type=Path, default=None, help="JSON file; standard output if absent"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.output is not None and not os.access(args.output.resolve().parent, os.W_OK):
        print(f"error: {args.output.parent} is not a folder that can be written", file=sys.stderr)
        return 1
    settings = BenchSettings(args.batch_size, args.img_size, args.threads, args.seconds, device=args.device)
    before = machine()
    rows = benchmark_models(args.models, settings)
    result = {"machine": before, "settings": dataclasses.asdict(settings), "rows": rows}
    text = json.dumps(result, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        part = args.output.with_name(args.output.name + ".part")
        part.write_text(text)
        part.replace(args.output)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
