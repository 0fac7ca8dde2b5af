"""ONNX Runtime and OpenVINO as runtimes, and files of the user's as models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import vitzoo
from vitzoo.benchmark import runtimes
from vitzoo.benchmark.case import Case
from vitzoo.benchmark.runtimes import open_file

pytest.importorskip("onnxruntime")
QUICK = dict(seconds=0.02, min_rounds=3, warmup_seconds=0.02, memory=False, threads=1)
VIM = dict(depth=1, num_classes=5)
RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"))]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "vim.onnx"
    vitzoo.export_onnx(_model(), path, (3, 32, 32), check=False)
    return path


def _model() -> nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model("vim_tiny_patch16_224", img_size=32, **VIM)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_gives_the_models_numbers(file: Path, runtime: str) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = open_file(Case(str(file), runtime=runtime, file=file, threads=1))(x.numpy())
    with torch.no_grad():
        expected = _model().eval()(x)
    torch.testing.assert_close(torch.from_numpy(out[0]), expected, rtol=1e-4, atol=1e-5)


def test_models_and_files_side_by_side(file: Path) -> None:
    found = vitzoo.benchmark(
        "vim_tiny_patch16_224", kwargs=VIM, img_size=32, batch_size=[1, 2], runtime=["eager", "onnxruntime"],
        against=str(file), **QUICK,
    )  # fmt: skip
    assert found.failed == []
    ours = [row for row in found.rows if row["model"] == "vim_tiny_patch16_224"]
    theirs = [row for row in found.rows if row["model"] == str(file)]
    assert [(r["runtime"], r["infer_batch_size"]) for r in ours] == [
        ("eager", 1), ("eager", 2), ("onnxruntime", 1), ("onnxruntime", 2)
    ]  # fmt: skip
    assert {row["runtime"] for row in theirs} == {"onnxruntime"}
    assert 0 < ours[2]["difference_from_eager"] < 1e-4
    assert theirs[0]["difference_from_eager"] is None
    assert {row["ratio_to"] for row in found.rows} == {str(file)}
    assert theirs[0]["param_count"] == pytest.approx(ours[0]["param_count"], rel=0.02)
    assert theirs[0]["weight_mib"] == pytest.approx(file.stat().st_size / 2**20, abs=1e-3)


def test_int8_is_a_quantized_file_beside_the_float_one() -> None:
    found = vitzoo.benchmark(
        "deit_tiny_patch16_224", kwargs=dict(depth=1, num_classes=5), img_size=32, dtype=["float32", "int8"],
        runtime="onnxruntime", **QUICK,
    )  # fmt: skip
    assert found.failed == []
    whole, quantized = found.rows
    assert (whole["precision"], quantized["precision"]) == ("float32", "int8")
    assert whole["difference_from_eager"] < 1e-4 < quantized["difference_from_eager"] < 0.2
    assert quantized["weight_mib"] < 0.4 * whole["weight_mib"]
    assert quantized["infer_gmacs"] == whole["infer_gmacs"]


def test_int8_of_a_users_file_is_refused(file: Path) -> None:
    (row,) = vitzoo.benchmark(str(file), dtype="int8", img_size=32, **QUICK).rows
    assert row["error_kind"] == "unsupported"
    assert f"not of {file}" in row["error"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "float32 inference on the CPU, not bfloat16"),
        ({"mode": "train"}, "not train"),
        ({"memory_format": "channels_last"}, "not channels_last"),
    ],
    ids=str,
)
def test_what_a_runtime_does_not_take_is_an_error_in_the_row(settings: dict, message: str) -> None:
    (row,) = vitzoo.benchmark(nn.Identity(), runtime="onnxruntime", **settings, **QUICK).rows
    assert row["error_kind"] == "unsupported"
    assert message in row["error"]


@pytest.mark.parametrize(("runtime", "line"), runtimes.INSTALL.items())
def test_a_missing_package_names_its_install_line(monkeypatch, runtime: str, line: str) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    (row,) = vitzoo.benchmark(nn.Identity(), runtime=runtime, **QUICK).rows
    assert row["error_kind"] == "missing package"
    assert line in row["error"]


def test_a_file_of_a_fixed_size(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    program = torch.onnx.export(nn.Flatten().eval(), (torch.zeros(2, 3, 8, 8),), dynamo=True, verbose=False)
    program.save(path)
    good, batch, size = (
        vitzoo.benchmark(str(path), batch_size=b, img_size=s, **QUICK).rows[0]
        for b, s in [(2, 8), (4, 8), (2, 16)]
    )
    assert good["infer_img_size"] == 8
    assert "fixed batch of 2, not 4" in batch["error"]
    assert "fixed height of 8, not 16" in size["error"]
