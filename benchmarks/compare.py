"""Set two result files of run_kernels.py side by side.

python benchmarks/compare.py before.json after.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Key = tuple[str, ...]


def rows(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """Return the machine and the results by what was measured."""
    data = json.loads(path.read_text())
    keys = ("operator", "shape", "dtype", "pass", "backend", "baseline")
    return data["machine"], {tuple(row[key] for key in keys): row for row in data["results"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    (before_machine, before), (after_machine, after) = rows(args.before), rows(args.after)
    for key in sorted(before_machine.keys() | after_machine.keys()):
        if before_machine.get(key) != after_machine.get(key):
            print(f"{key}: {before_machine.get(key)} -> {after_machine.get(key)}")
    for key in sorted(before.keys() | after.keys()):
        label = " ".join(key)
        if key not in before or key not in after:
            print(f"{label:75} only in {'after' if key in after else 'before'}")
            continue
        old, new = before[key], after[key]
        times = [row["times"][row["backend"]]["median_ms"] for row in (old, new)]
        print(
            f"{label:75} {times[0]:9.2f} -> {times[1]:9.2f} ms ({times[0] / times[1]:4.2f}x), "
            f"over {old['baseline']}: {old['ratio']:5.1f}x -> {new['ratio']:5.1f}x"
        )


if __name__ == "__main__":
    main()
