"""Write the headline suite's claims from a result file into README.md, between its two markers.

    vitzoo bench --suite headlines -o benchmarks/results/headlines_<cpu>_<isa>.jsonl
    python benchmarks/readme_table.py [that file]

Without a file, the one named in README.md is read again. tests/benchmark/test_readme_table.py fails when README.md is
not what the file gives; the file's digest is part of that.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import textwrap
from pathlib import Path
from typing import Any

from vitzoo.benchmark.results import Results, read_results
from vitzoo.benchmark.view import claims_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARKED = re.compile(r"<!-- headlines of (?P<file>\S*) .*?-->\n.*?<!-- end of headlines -->\n", re.DOTALL)


def block(file: str, root: Path = ROOT) -> str:
    """Return the text from the first marker to the last for a result file, given by its path from the root.

    Raises:
        ValueError: the file is not of a whole headline suite.
    """
    path = root / file
    found = read_results(path)
    if not found.claims or found.header.get("quick") or found.header["measure"].get("passes", 1) < 2:
        raise ValueError(
            f"{path} is not a full run, in several passes, of a suite with claims: "
            "vitzoo bench --suite headlines -o FILE"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    frame = claims_table(found.claims)
    frame.insert(1, "source", [claim["source"] for claim in found.claims])
    table = frame.to_markdown(index=False, disable_numparse=True)
    start = f"<!-- headlines of {file} sha256 {digest}: `make readme-table` -->"
    return f"{start}\n{table}\n\n{_where(found, file)}\n<!-- end of headlines -->\n"


def _where(found: Results, file: str) -> str:
    machine: dict[str, Any] = found.header["machine"]
    cpu, versions = machine["cpu"], machine["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "onnxruntime"))
    measure = found.header["measure"]
    facts = [
        f"Measured on {cpu['model']} ({cpu['torch_capability']}), {cpu['usable_cores']} cores",
        f"float32, {installed}, commit {machine['commit'][:7]}, {machine['time'][:10]}.",
    ]
    facts[-1] += (
        f" Ratios of medians, the geometric mean of {measure['passes']} passes in fresh processes, with Student's"
        f" {measure['confidence']:.0%} interval; memory has none."
    )
    facts[-1] += (
        f" A claim holds here from {_tolerance(found)} of the claimed ratio up; most were made for GPUs."
    )
    facts[-1] += f" Every row: [{file}]({file})."
    return textwrap.fill(", ".join(facts), 120, break_long_words=False, break_on_hyphens=False)


def _tolerance(found: Results) -> str:
    shares = sorted({claim["tolerance"] for claim in found.claims})
    return " or ".join(f"{share:.0%}" for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="default: the one that README.md names")
    args = parser.parse_args()
    text = README.read_text()
    marked = MARKED.search(text)
    if marked is None:
        raise SystemExit(
            "README.md has lost its markers: <!-- headlines of FILE ... --> and <!-- end of headlines -->"
        )
    file = marked["file"] if args.file is None else args.file.resolve().relative_to(ROOT).as_posix()
    partial = README.with_suffix(".part")
    partial.write_text(text[: marked.start()] + block(file) + text[marked.end() :])
    partial.replace(README)


if __name__ == "__main__":
    main()
