"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import vitzoo
from vitzoo.cli import app

SMALL = ["-k", "depth=1", "--img-size", "32"]


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def _json(*arguments: str):
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_list() -> None:
    rows = _json("list", "*vim*", "--category", "scan")
    assert [r["model"] for r in rows] == vitzoo.list_models("*vim*", category="scan")
    assert {"vim_tiny_patch16_224", "efficientvim_m1"} <= {r["model"] for r in rows}
    assert "vim_tiny_patch16_224" in _run("list", "vim*").stdout


def test_info() -> None:
    info = _json("info", "evit_small_patch16_224")
    assert info["params"] == 22_050_664
    assert len([c for c in info["checkpoints"] if "keep" in c["name"]]) == 10
    assert "2202.07800" in _run("info", "evit_small_patch16_224").stdout


def test_flops() -> None:
    count = _json("flops", "vim_tiny_patch16_224", *SMALL)
    model = vitzoo.create_model("vim_tiny_patch16_224", depth=1, img_size=32)
    assert count["gmacs"] == vitzoo.count_flops(model, (3, 32, 32)).gmacs
    assert count["gflops"] == 2 * count["gmacs"]
    assert count["uncounted_ops"] == []
    assert "kind: scan" in _run("flops", "vim_tiny_patch16_224", *SMALL).stdout


def test_flops_warns_of_what_it_cannot_count(monkeypatch) -> None:
    from vitzoo.benchmark import flops

    counted = flops.FlopCount(macs=1, params=1, input_size=(3, 8, 8), uncounted_ops=["mine::op"])
    monkeypatch.setattr(flops, "count_flops", lambda *args, **kwargs: counted)
    result = _run("flops", "vim_tiny_patch16_224", *SMALL, "--json")
    assert json.loads(result.stdout)["uncounted_ops"] == ["mine::op"]
    assert "not counted" in result.stderr
    assert "mine::op" in result.stderr


QUICK = ["--seconds", "0.05", "--min-rounds", "3", "--no-memory"]


def test_bench(tmp_path: Path) -> None:
    names = ["vim_tiny_patch16_224", "vim_small_patch16_224"]
    files = ["-o", str(tmp_path / "r.jsonl"), "--csv", str(tmp_path / "r.csv")]
    found = _json("bench", *names, *SMALL, *QUICK, "-b", "1,2", *files)
    assert [(r["model"], r["infer_batch_size"]) for r in found["rows"]] == [
        (n, b) for b in (1, 2) for n in names
    ]
    for row in found["rows"]:
        assert row["infer_samples_per_sec"] == pytest.approx(
            1e3 * row["infer_batch_size"] / row["infer_step_time"], rel=1e-4
        )
        assert row["p50_ms"] <= row["p90_ms"]
    assert found["machine"]["cpu"]["flags"]
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", *["result"] * 4]
    assert lines[1]["samples_s"]
    assert (tmp_path / "r.csv").read_text().startswith("model,infer_img_size,infer_samples_per_sec,")


def test_report_of_what_bench_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("textalloc")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "bench",
        "vim_tiny_patch16_224",
        "-k",
        "depth=1",
        *QUICK,
        "--img-size",
        "32,64",
        "-o",
        "r.jsonl",
    ]
    assert _run(*arguments).exit_code == 0
    written = ["throughput_vs_gmacs.png", "latency_vs_resolution.png"]
    assert _json("report", "r.jsonl", "--png", "plots") == {"written": [f"plots/{name}" for name in written]}
    assert sorted(path.name for path in Path("plots").iterdir()) == sorted(written)
    assert "wrote report.html" in _run("report", "r.jsonl").stderr
    assert "vim_tiny_patch16_224" in Path("report.html").read_text()
    refused = _run("report", "r.jsonl")
    assert refused.exit_code == 1
    assert "the output exists; choose another or say --force" in " ".join(refused.stderr.split())
    assert _run("report", "r.jsonl", "--force").exit_code == 0


def test_bench_prints_a_table_and_takes_baselines() -> None:
    arguments = ["--against", "timm:deit_tiny_patch16_224", "-k", "depth=1", "--img-size", "32"]
    result = _run("bench", "vim_tiny_patch16_224", *arguments, *QUICK)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "batch 1" in lines[0]
    assert "32 pixels" in lines[0]
    rows = {line.split("│")[1].strip(): line.split("│") for line in lines if line.startswith("│")}
    assert set(rows) == {"vim_tiny_patch16_224", "timm:deit_tiny_patch16_224"}
    assert rows["timm:deit_tiny_patch16_224"][7].strip() == "1.00"


def test_bench_warns_of_what_it_cannot_count(monkeypatch) -> None:
    from vitzoo.benchmark import models
    from vitzoo.benchmark.flops import FlopCount

    counted = FlopCount(macs=1, params=1, input_size=(3, 32, 32), uncounted_ops=["mine::op"])
    monkeypatch.setattr(models, "count_flops", lambda *args: counted)
    result = _run("bench", "vim_tiny_patch16_224", *SMALL, *QUICK)
    assert "FLOPs not counted of mine::op" in result.stderr


def test_bench_warns_of_a_file_that_gives_other_numbers(monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    from vitzoo.benchmark import subject

    monkeypatch.setattr(subject, "difference_from_eager", lambda case, run: 0.25)
    arguments = ["--kwargs", "dim=24", "-k", "num_heads=3", "--runtime", "onnxruntime"]
    result = _run("bench", "layer:global", *arguments, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "output is 0.25 from eager's" in result.stderr


def test_bench_goes_on_after_a_model_that_fails() -> None:
    names = ["vim_tiny_patch16_224", "litv2_small"]
    result = _run("bench", *names, "-k", "depth=1", *QUICK, "--json")
    rows = json.loads(result.stdout)["rows"]
    assert result.exit_code == 1
    assert "error" not in rows[0]
    assert "depth" in rows[1]["error"]
    table = _run("bench", *names, "-k", "depth=1", "--img-size", "32", *QUICK)
    assert "depth" in table.stdout


def test_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    report = _json("export", "vim_tiny_patch16_224", *SMALL, "-o", str(path))
    assert path.stat().st_size == report["size_bytes"]
    assert report["nodes"]["Scan"] == 1
    assert report["max_relative_difference"] < 1e-4


def test_export_of_an_archive_by_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    report = _json("export", "vim_tiny_patch16_224", *SMALL, "-o", str(path))
    assert report["format"] == "torch-export"
    assert report["max_relative_difference"] < 1e-6
    facts = json.loads((tmp_path / "m.json").read_text())
    assert facts["bytes"] == path.stat().st_size
    assert facts["architecture"] == "vim_tiny_patch16_224"


def test_export_of_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = vitzoo.create_model("vim_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    weights, path = tmp_path / "w.pth", tmp_path / "m.onnx"
    _json("export", "vim_tiny_patch16_224", *SMALL, "--checkpoint", str(weights), "-o", str(path))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (logits,) = session.run(None, {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_doctor() -> None:
    found = _json("doctor")
    entry = next(e for e in found["operators"] if e["operator"] == "selective_scan")
    assert entry["backends"]["reference"] is None
    assert entry["runs"] == ("cpu" if found["extension"]["loaded"] else "reference")
    assert found["extension"]["loaded"] == (found["extension"]["why_not"] is None)
    assert found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "operators" in _run("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "vim_tiny"], 1, "did you mean vim_tiny_patch16_224"),
        (["list", "--category", "fast"], 1, "unknown category 'fast'"),
        (["flops", "litv2_small", "-k", "alpha"], 2, "not of the form name=value"),
        (["flops", "litv2_small", "-k", "alfa=1"], 1, "alfa"),
        (["flops", "litv2_small", "--img-size", "0"], 2, "neither a side in pixels nor HxW"),
        (["bench", "litv2_small", "-b", "0"], 1, "batch_size 0 is not a positive integer"),
        (["bench", "litv2_small", "-b", "-1"], 1, "batch_size -1 is not a positive integer"),
        (["bench", "litv2_small", "-b", "many"], 2, "not whole numbers"),
        (["bench", "litv2_small", "--dtype", "float8"], 1, "known: float32, bfloat16, float16, int8"),
        (["bench", "litv2_small", "-o", "nowhere/r.jsonl"], 1, "output's folder does not exist"),
        (["bench", "litv2_small", "-o", "tests"], 1, "name a file in it"),
        (["bench", "litv2_small", "-o", "README.md"], 1, "the output exists; choose another or say --force"),
        (["bench", "litv2_small", "--csv", "README.md"], 1, "the output exists"),
        (["bench", "litv2_small", "--against", "nowhere.onnx"], 1, "no such ONNX file"),
        (["bench"], 2, "one of the two"),
        (["report", "nowhere.jsonl"], 1, "there is no such result file; `vitzoo bench -o FILE` writes one"),
        (["report", "README.md"], 1, "README.md, line 1: not a row of a vitzoo result file"),
        (
            ["export", "litv2_small", "--format", "tflite"],
            1,
            "there is no format 'tflite'; formats: onnx (.onnx),",
        ),
        (["export", "litv2_small", "-o", "m.pt"], 1, "the file name 'm.pt' says no format by its suffix"),
        (
            ["export", "litv2_small", "--format", "onnx", "-o", "m.pt2"],
            1,
            "is not of format onnx by its suffix",
        ),
        (["export", "vim_tiny_patch16_224", *SMALL, "-o", "nowhere/m.onnx"], 1, "nowhere"),
        (["export", "litv2_small", "--checkpoint", "nowhere.pth"], 1, "no checkpoint file at nowhere.pth"),
        (["evit_small_patch16_224"], 2, "No such command"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_say_what_to_do(arguments: list[str], code: int, message: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    "command", ["list", "info", "flops", "bench", "compare", "report", "export", "demo", "doctor"]
)
def test_help_has_an_example(command: str) -> None:
    result = _run(command, "--help")
    assert result.exit_code == 0
    assert f"vitzoo {command}" in result.stdout.split("Example")[1]


def test_json_is_all_that_a_process_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitzoo", "flops", "vim_tiny_patch16_224", *SMALL, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["model"] == "vim_tiny_patch16_224"


def test_a_pipe_gets_whole_rows_and_an_error_is_one_line(monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    listed = CliRunner().invoke(app, ["list", "vim*"]).stdout.splitlines()
    row = next(line for line in listed if "vim_tiny_patch16_stride8_224" in line)
    cells = [cell.strip() for cell in row.strip().strip("│").split("│")]
    assert cells == ["vim_tiny_patch16_stride8_224", "vim", "scan", "7.3", "-", "78.3", "vitzoo"]
    message = CliRunner().invoke(app, ["info", "vim_tiny_patch16_225"]).stderr
    assert message.startswith("error: UnknownModelError: unknown model 'vim_tiny_patch16_225': did you mean ")
    assert message.count("\n") == 1
