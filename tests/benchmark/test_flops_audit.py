"""The committed audit of FLOP counters: complete, explained, and what the counters say today."""

from __future__ import annotations

import json

import flops_audit
import pytest

ROWS = {row["model"]: row for row in json.loads(flops_audit.RESULT.read_text())["rows"]}
# one of each kind of work: fused attention, deformable convolution, EViT's operators, scans, HiLo's
SAMPLE = {
    "deit_tiny_patch16_224",
    "efficientvit_m0",
    "evit_tiny_patch16_224",
    "litv2_small",
    "vim_tiny_patch16_224",
}


def test_every_model_is_in_the_file() -> None:
    assert list(ROWS) == flops_audit.audited(), "run: python benchmarks/flops_audit.py"


@pytest.mark.parametrize("tool", ["torch", "fvcore"])
def test_every_difference_is_explained(tool: str) -> None:
    for name, row in ROWS.items():
        terms = row[f"{tool}_terms"]
        assert row[f"{tool}_gmacs"] == pytest.approx(row["gmacs"] + sum(terms.values()), abs=1e-4), name
        assert abs(terms.get("other products", 0.0)) < 1e-3 * row["gmacs"], name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in flops_audit.audited()]
)
def test_the_counters_say_what_the_file_says(name: str) -> None:
    assert flops_audit.audit(name) == ROWS[name], "run: python benchmarks/flops_audit.py"
