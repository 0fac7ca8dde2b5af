"""Comparing result files: a slower model is found, a file beside itself gives no verdict."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn
from typer.testing import CliRunner

import vitzoo
from vitzoo.benchmark.compare import compare_files
from vitzoo.benchmark.results import SCHEMA_VERSION, Recorder
from vitzoo.benchmark.statistics import Ratio, change, ratio_of_medians
from vitzoo.cli import app


class _Sleeps(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            time.sleep(self.seconds)
        return x


def _measured(path: Path, seconds: float) -> Path:
    models = {"changes": _Sleeps(seconds), "stays": _Sleeps(0.004)}
    vitzoo.benchmark(
        models, img_size=8, seconds=0.15, min_rounds=30, warmup_seconds=0.1, memory=False, output=path
    )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return _measured(folder / "before.jsonl", 0.004), _measured(folder / "after.jsonl", 0.012)


def _written(path: Path, rows: dict[str, np.ndarray], **more) -> Path:
    with Recorder(path) as recorder:
        recorder.write(
            {"kind": "header", "schema_version": SCHEMA_VERSION, "machine": {"cpu": {"model": "x"}}} | more
        )
        for label, samples in rows.items():
            row = {
                "kind": "result",
                "schema_version": SCHEMA_VERSION,
                "label": label,
                "model": "m",
                "mode": "infer",
            }
            row |= {
                "requested_img_size": 224,
                "requested_batch_size": 1,
                "infer_step_time": 1e3 * np.median(samples),
            }
            recorder.write(row | {"samples_s": samples.tolist()})
    return path


def _noise(seed: int, rounds: int = 100) -> np.ndarray:
    return 0.01 * np.exp(np.random.default_rng(seed).normal(0, 0.03, rounds))


def test_a_slowed_model_is_detected(files: tuple[Path, Path]) -> None:
    found = {d.row["label"]: d for d in compare_files(*files).differences}
    assert found["changes"].verdict == "slower"
    assert found["changes"].ratio.value == pytest.approx(4 / 12, rel=0.15)
    assert found["changes"].after > found["changes"].before
    reversed_ = {d.row["label"]: d for d in compare_files(*reversed(files)).differences}
    assert reversed_["changes"].verdict == "faster"


def test_a_file_beside_itself_gives_no_verdict(files: tuple[Path, Path]) -> None:
    for path in files:
        comparison = compare_files(path, path)
        assert [d.verdict for d in comparison.differences] == ["", ""]
        assert [d.ratio.value for d in comparison.differences] == [1, 1]
        assert comparison.machines == {}
        assert comparison.only_first == comparison.only_second == []


def test_two_runs_of_the_same_agree_within_their_intervals(tmp_path: Path) -> None:
    rows = {str(seed): _noise(seed) for seed in range(40)}
    again = {str(seed): _noise(seed + 100) for seed in range(40)}
    comparison = compare_files(_written(tmp_path / "a", rows), _written(tmp_path / "b", again))
    assert sum(bool(d.verdict) for d in comparison.differences) <= 2
    assert all(d.ratio.low < d.ratio.value < d.ratio.high for d in comparison.differences)


def test_processes_that_differ_are_no_difference(tmp_path: Path) -> None:
    """Two runs of the same model, each of five processes that settle on levels of their own."""
    files = []
    for run in range(2):
        rows = {}
        for model in range(20):
            levels = np.exp(np.random.default_rng([run, model]).normal(0, 0.1, 5))
            rows[str(model)] = np.concatenate(
                [level * _noise(1000 * run + 10 * model + i) for i, level in enumerate(levels)]
            )
        path = _written(tmp_path / str(run), rows)
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        lines = [line | {"samples_passes": [100] * 5} for line in lines]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *lines)))
        files.append(path)
    assert sum(bool(d.verdict) for d in compare_files(*files).differences) <= 1  # at 99%, of 20
    for path in files:  # as if of one process each
        path.write_text(path.read_text().replace("[100, 100, 100, 100, 100]", "[500]"))
    assert sum(bool(d.verdict) for d in compare_files(*files).differences) > 5


def test_a_slower_machine_is_no_slower_model(tmp_path: Path) -> None:
    """A run on a machine at 80% of its speed differs in every time, and in no ratio to the baseline."""
    slow = np.exp(np.random.default_rng(7).normal(0, 0.2, 400))  # of every round, whichever model runs
    files, speeds = [], {"same": (1, 1), "slower": (1, 0.9), "base": (1, 1)}
    for number, machine in enumerate((1, 0.8)):
        rows = {
            label: _noise(10 * number + i, 400) * slow / machine / of[number]
            for i, (label, of) in enumerate(speeds.items())
        }
        path = _written(tmp_path / str(number), rows, measure={"confidence": 0.99})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[1:]:
            ratio = ratio_of_medians(rows["base"], rows[line["label"]], paired=True)
            line |= {
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "ratio_to": "base",
            }
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        files.append(path)
    found = {d.row["label"]: d for d in compare_files(*files).differences}
    assert {label: d.verdict for label, d in found.items()} == dict.fromkeys(speeds, "slower")
    assert {label: d.relative_verdict for label, d in found.items()} == {
        "same": "",
        "slower": "slower",
        "base": "",
    }
    assert found["slower"].relative.low < 0.9 < found["slower"].relative.high
    assert found["base"].relative is None
    silent = tmp_path / "silent"  # of the confidence of its intervals
    header, *rest = files[0].read_text().splitlines()
    header = json.dumps({k: v for k, v in json.loads(header).items() if k != "measure"})
    silent.write_text("\n".join([header, *rest, ""]))
    for pair in ((silent, silent), (silent, files[1])):
        assert [d.relative for d in compare_files(*pair).differences] == [None] * 3
    shown = json.loads(CliRunner().invoke(app, ["compare", *map(str, files), "--json"]).stdout)["differences"]
    assert [d["relative_verdict"] for d in shown] == ["", "slower", ""]
    assert [d["relative"] and d["relative"]["value"] for d in shown] == [
        d.relative and d.relative.value for d in found.values()
    ]


def test_the_interval_of_a_change_covers_it_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        drawn = np.exp(random.normal(0, (0.02, 0.05)))
        ends = [
            Ratio(x, x * np.exp(-1.96 * s), x * np.exp(1.96 * s), 0.95)
            for x, s in zip(drawn, (0.02, 0.05), strict=True)
        ]
        covered += not change(*ends).differs
    assert 0.94 < covered / 2000 < 0.96
    with pytest.raises(ValueError, match=r"intervals of 0\.9 and 0\.95 are not alike"):
        change(Ratio(1, 1, 1, 0.9), Ratio(1, 1, 1, 0.95))


def test_rows_are_matched_and_machines_told_apart(tmp_path: Path) -> None:
    a = _written(tmp_path / "a", {"same": _noise(0), "gone": _noise(1)})
    b = _written(tmp_path / "b", {"new": _noise(2), "same": _noise(3)}, machine={"cpu": {"model": "y"}})
    comparison = compare_files(a, b)
    assert [d.row["label"] for d in comparison.differences] == ["same"]
    assert (comparison.only_first, comparison.only_second) == (["gone"], ["new"])
    assert comparison.machines == {"cpu.model": ("x", "y")}


def test_a_row_with_an_error_has_no_ratio(tmp_path: Path) -> None:
    a = _written(tmp_path / "a", {"m": _noise(0)})
    lines = a.read_text().splitlines()
    row = json.loads(lines[1])
    del row["samples_s"], row["infer_step_time"]
    (tmp_path / "b").write_text(f"{lines[0]}\n{json.dumps(row | {'error': 'MemoryError: no'})}\n")
    (difference,) = compare_files(a, tmp_path / "b").differences
    assert (difference.ratio, difference.verdict, difference.note) == (None, "", "second: MemoryError: no")


def test_command(files: tuple[Path, Path]) -> None:
    names = [str(path) for path in files]
    result = CliRunner().invoke(app, ["compare", *names], env={"COLUMNS": "220"})
    assert result.exit_code == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "changes" in line)
    assert "slower" in line
    found = json.loads(CliRunner().invoke(app, ["compare", *names, "--json"]).stdout)
    verdicts = {d["row"]["label"]: d["verdict"] for d in found["differences"]}
    assert verdicts["changes"] == "slower"
    missing = CliRunner().invoke(app, ["compare", names[0], "nowhere.jsonl"])
    assert missing.exit_code == 1
    assert "nowhere.jsonl" in missing.stderr
    unfit = CliRunner().invoke(app, ["compare", *names, "--confidence", "99"])
    assert "confidence 99.0 is not between 0 and 1" in unfit.stderr
