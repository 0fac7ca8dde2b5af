"""`vitzoo quantize` from a folder of images to a file that passed the gate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitzoo.cli import app
from vitzoo.deploy import auto, gate

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

MODEL = ["deit_tiny_patch16_224", "--img-size", "64", "-k", "depth=1", "-k", "num_classes=5"]
LENIENT = ["--least-coverage", "0.5", "--least-speed", "0", "--held-back", "4", "--images", "16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for i in range(20):
        Image.fromarray(random.randint(0, 256, (70, 70, 3), np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "03.png").write_bytes(b"broken")
    return folder


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_a_folder_of_images_becomes_an_integer_file(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "file_speeds", lambda floating, candidates, *rest: [2.0] * len(candidates))
    path = tmp_path / "int8.onnx"
    report = tmp_path / "layers.json"
    code, out, err = _run(
        *MODEL,
        *("--calibration", photos, "-o", path, *LENIENT, "--target", "x86-avx2", "--json"),
        *("--sensitivity", report),
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["skipped_images"] == 1
    assert found["calibration_images"] == 16
    assert found["images"] == 3
    assert found["recipe"] == "auto"
    assert any(layer["why"] == "the fastest" for layer in found["layers"])
    assert 0.5 < found["coverage"] < 1
    assert 0 < found["logit_error"] < 0.2
    assert "1 images could not be read" in err
    assert sorted(os.listdir(tmp_path)) == ["int8.json", "int8.onnx", "layers.json"]
    costs = {layer["name"]: layer for layer in json.loads(report.read_text())["layers"]}
    assert costs["blocks.0.mlp.fc1"]["sqnr_db"] > 20
    assert 0 < costs["blocks.0.mlp.fc1"]["logit_error"] < 0.2
    assert costs["blocks.0.attn.scores"]["logit_error"] is None


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_the_suffix_chooses_pytorch(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SECONDS", 0.05)
    path = tmp_path / "int8.pt2"
    code, out, err = _run(
        *MODEL,
        "--calibration",
        photos,
        "-o",
        path,
        *LENIENT,
        "--target",
        "x86-avx2",
        "--recipe",
        "w8a8",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["coverage"] > 0.5
    facts = json.loads((tmp_path / "int8.json").read_text())
    assert facts["format"] == "torch-export"
    assert not facts["recipe"]["reduce_range"], "our kernels do not saturate"


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_a_file_for_tensorrt_is_symmetric_and_has_no_speed(photos: Path, tmp_path: Path) -> None:
    common = (*MODEL, "--calibration", photos, *LENIENT, "--target", "tensorrt")
    code, out, err = _run(*common, "-o", tmp_path / "int8.onnx", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["speed"] is None
    assert 0.5 < found["coverage"] == pytest.approx(found["quantized_macs"])
    assert 0 < found["calibration_logit_error"] <= 0.03  # the budget of "auto"
    assert json.loads((tmp_path / "int8.json").read_text())["recipe"]["symmetric"]
    code, _, err = _run(*common, "-o", tmp_path / "int8.xml")
    assert code == 1
    assert "TensorRT reads ONNX files: name it int8.onnx, not int8.xml" in err


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_a_file_that_is_too_slow_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "file_speeds", lambda floating, candidates, *rest: [2.0] * len(candidates))
    path = tmp_path / "int8.onnx"
    fast = [*LENIENT[:3], "1000", *LENIENT[4:]]
    code, _, err = _run(*MODEL, "--calibration", photos, "-o", path, *fast, "--target", "x86-avx2")
    assert code == 1
    assert "below 1000" in err
    assert os.listdir(tmp_path) == ["int8.float.onnx"]


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_no_integers_are_chosen_whose_file_is_slower(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "file_speeds", lambda floating, candidates, *rest: [0.9] * len(candidates))
    monkeypatch.setattr(gate, "SECONDS", 0.05)
    path = tmp_path / "int8.onnx"
    code, _, err = _run(*MODEL, "--calibration", photos, "-o", path, *LENIENT, "--target", "x86-avx2")
    assert code == 1
    assert "float is the fastest that holds the error budget of 3.0%" in err
    assert "Kept the float file" in err
    assert os.listdir(tmp_path) == ["int8.float.onnx"]


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_fewer_bits_are_simulated_and_say_so(photos: Path, tmp_path: Path) -> None:
    code, out, err = _run(
        *MODEL, "--calibration", photos, "--recipe", "w6a6", "-o", tmp_path / "m.onnx", *LENIENT, "--layers"
    )
    assert code == 0, err
    assert "recipe w6a6 is simulated" in err
    assert "blocks.0.mlp.fc1" in out
    assert os.listdir(tmp_path) == []


def test_mistakes_are_explained(photos: Path, tmp_path: Path) -> None:
    code, _, err = _run(*MODEL, "--calibration", photos, "--recipe", "w8a9")
    assert code == 1
    assert "there is no recipe 'w8a9'" in err
    code, _, err = _run(*MODEL, "--calibration", tmp_path)
    assert code == 1
    assert "has 0 images that can be read" in err
