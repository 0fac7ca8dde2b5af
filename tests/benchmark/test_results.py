"""Result files: valid after every row, never overwritten unasked, readable as timm's tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas
import pytest

from vitzoo.benchmark.results import SCHEMA_VERSION, Recorder, Results, read_results, write_csv

HEADER = {"kind": "header", "schema_version": SCHEMA_VERSION, "run": "r"}


def _row(model: str, speed: float = 10.0, **more) -> dict:
    row = {"kind": "result", "schema_version": SCHEMA_VERSION, "run": "r", "model": model, "mode": "infer"}
    row |= {"infer_img_size": 224, "infer_samples_per_sec": speed, "infer_step_time": 1e3 / speed}
    row |= {"infer_batch_size": 1, "param_count": 5.7, "infer_gmacs": 1.25, "samples_s": [0.1]}
    return row | more


def test_every_row_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Recorder(path) as recorder:
        for row in (HEADER, _row("a"), _row("b")):
            recorder.write(row)
            assert json.loads(path.read_text().splitlines()[-1]) == row
    read = read_results(path)
    assert (read.header, [row["model"] for row in read.rows]) == (HEADER, ["a", "b"])


def test_an_existing_file_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="--force"):
        Recorder(path)
    assert path.read_text() == "precious"
    with Recorder(path, force=True) as recorder:
        recorder.write(HEADER)
    assert read_results(path).header == HEADER


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        Recorder(tmp_path / "nowhere" / "r.jsonl")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        Recorder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        Recorder(tmp_path / "file" / "r.jsonl")


def test_no_row_that_is_not_json(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r.jsonl") as recorder, pytest.raises(ValueError, match="JSON"):
        recorder.write(_row("a", float("nan")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1: not a row"),
        ('{"kind": "mystery"}', "line 1: not a row"),
        ('{"kind": "header", "schema_version": 99}', "schema_version 99"),
        ("", "no header row"),
    ],
    ids=["not json", "unknown kind", "other schema", "empty"],
)
def test_a_file_that_is_not_ours(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "r.jsonl")


def test_csv_has_timms_columns_fastest_first(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    write_csv([_row("slow", 5.0), _row("fast", 20.0, p90_ms=1.0), {**_row("bad"), "error": "no"}], path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    timm = (
        "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count,infer_gmacs"
    )
    assert list(rows[0])[:7] == timm.split(",")
    assert [row["model"] for row in rows] == ["fast", "slow"]
    assert "samples_s" not in rows[0]
    # as timm's own result scripts do
    table = pandas.read_csv(path).sort_values(["infer_samples_per_sec", "model"], ascending=[False, True])
    assert list(table["param_count"].map("{:,.2f}".format)) == ["5.70", "5.70"]


def test_csv_of_training_and_of_nothing(tmp_path: Path) -> None:
    row = {"model": "a", "mode": "train", "train_samples_per_sec": 2.0, "train_step_time": 500.0}
    row |= {"train_batch_size": 1, "train_img_size": 32, "param_count": 1.0}
    write_csv([row], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("model,train_samples_per_sec,train_step_time,")
    write_csv([], tmp_path / "n.csv")
    assert (tmp_path / "n.csv").read_text().startswith("model,infer_img_size,")


def test_frame_and_failed() -> None:
    results = Results(HEADER, [_row("a"), {**_row("b"), "error": "no"}])
    assert list(results.frame()["model"]) == ["a", "b"]
    assert [row["model"] for row in results.failed] == ["b"]
