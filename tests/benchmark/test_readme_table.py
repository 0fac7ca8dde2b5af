"""README's headline table is what the committed result file says, and that file is a whole, consistent run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import readme_table

from vitzoo.benchmark.results import passes_of, read_results
from vitzoo.benchmark.suite import load_suite

TEXT = readme_table.README.read_text()
MARKED = readme_table.MARKED.search(TEXT)
FILE = readme_table.ROOT / MARKED["file"]


def test_readme_is_what_the_file_says() -> None:
    assert MARKED[0] == readme_table.block(MARKED["file"]), "run: make readme-table"


def test_the_file_answers_every_claim_of_the_suite() -> None:
    parts = load_suite("headlines").comparison
    asked = [(part.name, claim.text, claim.expected) for part in parts for claim in part.claim]
    answered = [(c["comparison"], c["text"], c["expected"]) for c in read_results(FILE).claims]
    assert sorted(answered) == sorted(asked)


def test_the_files_ratios_are_those_of_its_rows() -> None:
    found = read_results(FILE)
    rows = {(r["comparison"], r["label"], r["requested_img_size"]): r for r in found.rows}
    for claim in found.claims:
        two = [
            rows[claim["comparison"], claim[which], claim["img_size"]] for which in ("subject", "baseline")
        ]
        if claim["figure"] == "memory":
            ratio = two[1]["peak_mem_mib"] / two[0]["peak_mem_mib"]
        else:
            medians = [[np.median(samples) for samples in passes_of(row)] for row in two]
            ratio = np.exp(np.mean(np.log(medians[1]) - np.log(medians[0])))
        assert claim["measured"] == pytest.approx(ratio, rel=1e-3), claim["text"]
        reached = claim["measured"] >= claim["tolerance"] * claim["expected"]
        assert claim["verdict"] == ("holds" if reached else "does not hold here")


def test_an_edited_file_changes_the_block(tmp_path: Path) -> None:
    text = FILE.read_text()
    file = tmp_path / "r.jsonl"
    file.write_text(text)
    before = readme_table.block("r.jsonl", tmp_path)
    row = json.loads(text.splitlines()[1])
    file.write_text(text.replace(f'"p50_ms": {row["p50_ms"]}', '"p50_ms": 1.0', 1))
    assert readme_table.block("r.jsonl", tmp_path) != before


def test_a_quick_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(FILE.read_text().replace('"quick": false', '"quick": true', 1))
    with pytest.raises(ValueError, match="not a full run"):
        readme_table.block("q.jsonl", tmp_path)
