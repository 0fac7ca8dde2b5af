"""Suites: read strictly, measured in full, their claims judged."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitzoo.benchmark.claims import Claim, in_words, judged
from vitzoo.benchmark.results import read_results
from vitzoo.benchmark.suite import Suite, load_suite, parse, run_suite
from vitzoo.cli import app

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / "configs" / "benchmark").glob("*.toml"))
SMALL = """
title = "two layers"
[measure]
seconds = 0.02
min_rounds = 5
warmup_seconds = 0.02
memory = false
[quick]
seconds = 0.01
min_rounds = 3
memory = false
[[comparison]]
name = "layers"
img_size = [14, 28]
quick_img_size = [14]
entry = [
    { label = "narrow", model = "layer:global", kwargs = { dim = 24, num_heads = 3 } },
    { label = "wrong", model = "layer:global", kwargs = { dim = 25, num_heads = 3 } },
    { label = "same", model = "layer:global", kwargs = { dim = 24, num_heads = 3 } },
]
[[comparison.claim]]
text = "as fast"
source = "here"
subject = "narrow"
baseline = "same"
expected = 0.001
[[comparison.claim]]
text = "a million times as fast at 28"
source = "nobody"
subject = "narrow"
baseline = "same"
expected = 1000000
img_size = 28
[[comparison.claim]]
text = "what does not run"
source = "nobody"
subject = "wrong"
baseline = "same"
expected = 1.0
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_our_suites_are_about_models_that_exist(path: Path) -> None:
    suite = load_suite(path.stem)
    assert suite == load_suite(path)
    for comparison in suite.comparison:
        for quick in (False, True):
            for group in comparison.groups(quick):
                for case in group:
                    case.check_model()
            sizes = {group[0].img_size for group in comparison.groups(quick)}
            assert {claim.img_size for claim in comparison.claim} <= sizes | {None}
        assert all(claim.source for claim in comparison.claim)


def test_headlines_have_the_papers_claims() -> None:
    suite = load_suite("headlines")
    claimed = {(c.subject, c.baseline, c.figure): c.expected for part in suite.comparison for c in part.claim}
    assert claimed["EViT-S keep 0.7", "DeiT-S", "speed"] == 1.5
    assert claimed["HiLo", "spatial reduction", "speed"] == 1.4
    assert claimed["HiLo", "local windows", "speed"] == 1.6
    assert claimed["EfficientViT-M5", "MobileNetV3-L", "speed"] == 1.452
    assert claimed["EfficientViT-M2 ONNX", "MobileViT-XXS ONNX", "speed"] == 7.4
    assert claimed["Vim-Ti", "DeiT-Ti", "memory"] == pytest.approx(1 / (1 - 0.868), rel=0.01)
    assert {("Vim-Ti", "DeiT-Ti matrix", f) for f in ("speed", "memory")} <= set(claimed)
    assert {"Next-ViT-S", "LITv2-S", "Twins-SVT-S poly", "EfficientViT-M2"} <= {key[0] for key in claimed}


def test_a_suite_is_measured_and_judged(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    found = run_suite(small, output=path)
    assert [(row["label"], row["requested_img_size"]) for row in found.rows] == [
        (label, size) for size in (14, 28) for label in ("narrow", "wrong", "same")
    ]
    assert {row["comparison"] for row in found.rows} == {"layers"}
    verdicts = {(claim["text"], claim["img_size"]): claim["verdict"] for claim in found.claims}
    assert verdicts == {
        ("as fast", 14): "holds",
        ("as fast", 28): "holds",
        ("a million times as fast at 28", 28): "does not hold here",
        ("what does not run", 14): "not measured",
        ("what does not run", 28): "not measured",
    }
    first = found.claims[0]
    assert first["low"] <= first["measured"] <= first["high"]
    rows = {row["label"]: row for row in found.rows if row["requested_img_size"] == 14}
    assert first["measured"] == pytest.approx(
        rows["same"]["infer_step_time"] / rows["narrow"]["infer_step_time"], rel=1e-4
    )
    assert "wrong: AssertionError" in found.claims[1]["reason"]
    read = read_results(path)
    assert (read.claims, read.header["suite"]) == (found.claims, "two layers")


def test_command(small: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--suite", str(small), "--quick"], env={"COLUMNS": "250"})
    assert result.exit_code == 1  # of the model that does not run
    claims = result.stdout[result.stdout.index("claims, as measured on") :]
    assert "holds" in next(line for line in claims.splitlines() if "as fast" in line)
    assert "28 pixels" not in claims
    path = tmp_path / "c.csv"
    found = CliRunner().invoke(app, ["bench", "--suite", str(small), "--quick", "--json", "--csv", str(path)])
    assert [claim["verdict"] for claim in json.loads(found.stdout)["claims"]] == ["holds", "not measured"]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--suite", "nothing"], 1, "neither a suite of ours (headlines, quick"),
        (
            ["--suite", "headlines", "-b", "4", "--isolate"],
            2,
            "a suite settles --batch-size, --isolate in its file",
        ),
        (["--suite", "headlines", "cvt_13"], 2, "one of the two"),
        (["--quick", "cvt_13"], 2, "is a form of a --suite"),
    ],
    ids=["unknown", "settings", "models", "quick alone"],
)
def test_command_lines_that_make_no_sense(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("title", "tittle", "unknown key tittle in the suite; known: title, comparison, measure, quick"),
        ("min_rounds = 5", "rounds = 5", "unknown key rounds in measure"),
        ("img_size = [14, 28]", "image_size = [14]", "unknown key image_size in comparison 'layers'"),
        ('label = "narrow", ', 'label = "narrow", batch = 2, ', "unknown key batch in entry 'narrow'"),
        ('source = "here"\n', "", "claim number 1 lacks source"),
        ("img_size = [14, 28]", 'img_size = [14, "big"]', r"img_size = \[14, 'big'\] in comparison 'layers'"),
        ("seconds = 0.02", "seconds = true", "seconds = True in measure is not of type float"),
        ("seconds = 0.02", "seconds = -1", "seconds -1 is not positive"),
        ('baseline = "same"', 'baseline = "nobody"', "claim about 'nobody', not one of"),
        ('label = "wrong"', 'label = "same"', "are not all different"),
        ("expected = 1000000", "expected = 0", "out of range"),
        (
            "expected = 1000000",
            'expected = 1000000\nfigure = "beauty"',
            "unknown figure 'beauty'; known: speed, memory",
        ),
        ("[measure]", "[measure", "TOML|Expected"),
    ],
    ids=lambda value: value if value.isidentifier() else "",
)
def test_a_suite_that_is_wrong(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in SMALL
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(before, after, 1))
    with pytest.raises(ValueError, match=message) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([1.0, 1.01, 0.99] * 4, "holds"),
        ([1.0, 3.0, 1.3, 4.0, 1.1, 2.0] * 2, "holds, within noise"),
        ([4.0, 4.1, 3.9] * 4, "does not hold here"),
        ([2.6, 2.0, 2.3, 2.5, 2.4, 1.6] * 2, "does not hold here, within noise"),
    ],
)
def test_a_claim_that_noise_could_turn_says_so(samples: list, words: str) -> None:
    row = dict(threads=1, precision="float32", device="cpu", requested_batch_size=1, runtime="eager")
    rows = [{**row, "label": "a", "requested_img_size": None, "samples_s": samples}]
    rows.append({**rows[0], "label": "b", "samples_s": [4.0, 4.01, 3.99] * 4})
    (found,) = judged("c", [Claim("faster", "paper", "a", "b", 2.0)], rows, 0.99)
    assert in_words(found) == words


def test_a_table_where_another_thing_stands() -> None:
    with pytest.raises(ValueError, match="expected a list of tables"):
        parse(tomllib.loads('title = "t"\n[comparison]\nname = "n"'), Suite, "the suite")
    with pytest.raises(ValueError, match="measure is 3, expected a table"):
        parse({"title": "t", "comparison": [], "measure": 3}, Suite, "the suite")


@pytest.mark.parametrize(
    ("expected", "peaks", "verdict"),
    [(4.0, (100.0, 400.0), "holds"), (4.4, (100.0, 400.0), "holds"), (5.0, (100.0, 400.0), "does not hold here"),
     (4.0, (None, 400.0), "not measured")],
)  # fmt: skip
def test_claims_about_memory(expected: float, peaks: tuple, verdict: str) -> None:
    row = dict(threads=1, precision="float32", device="cpu", requested_batch_size=1, runtime="eager")
    row |= dict(requested_img_size=1248, samples_s=[1.0] * 5)
    rows = [{**row, "label": label, "peak_mem_mib": peak} for label, peak in zip("ab", peaks, strict=True)]
    claim = Claim("less memory", "paper", "a", "b", expected, figure="memory", img_size=1248)
    (found,) = judged("c", [claim], rows, 0.99)
    assert found["verdict"] == verdict
    assert found["measured"] == (None if peaks[0] is None else 4.0)
    assert judged("c", [claim], [{**r, "requested_img_size": 224} for r in rows], 0.99) == []
