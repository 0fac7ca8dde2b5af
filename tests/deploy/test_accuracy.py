"""vitzoo.validate: accuracies known by construction, of modules and of files; what is refused, skipped and said."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import vitzoo
from vitzoo.benchmark.results import read_results, read_rows
from vitzoo.cli import app
from vitzoo.deploy import Thresholds, accuracy, export_model, export_quantized
from vitzoo.deploy.exported import read_exported
from vitzoo.export import ExportError
from vitzoo.export.openvino import convert_onnx
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.model import QuantizedModel
from vitzoo.testing import image

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

NEEDS_OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs OpenVINO: pip install 'vitzoo[openvino]'"
)
ANYTHING = Thresholds(coverage=0, speed=0)
CLASSES = ("1", "2", "10", "11", "20", "100")  # in timm's order, which is not the alphabet's
SIDE = 16
EXPECTED = {"top1": 75.0, "top1_err": 25.0, "top5": 95.8333, "top5_err": 4.1667}


class Grey(nn.Module):
    """Names the class whose level of grey is nearest to the image's mean."""

    num_classes = len(CLASSES)

    def __init__(self) -> None:
        super().__init__()
        levels = torch.linspace(-1, 1, len(CLASSES))
        self.conv = nn.Conv2d(3, len(CLASSES), 1)
        with torch.no_grad():  # tangents of a parabola: the highest is that of the nearest level
            self.conv.weight.copy_((2 * levels / 3)[:, None, None, None].expand(-1, 3, 1, 1))
            self.conv.bias.copy_(-levels.square())
        self.pretrained_cfg = {
            "architecture": "grey",
            "input_size": (3, SIDE, SIDE),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(CLASSES),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def _paint(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), 51 * level, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images a class, the last one grey as the class before it."""
    for number, name in enumerate(CLASSES):
        for i in range(3):
            _paint(tmp_path / "val" / name / f"{i}.png", number)
        _paint(tmp_path / "val" / name / "deeper" / "3.PNG", (number - 1) % len(CLASSES))
    return tmp_path / "val"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Grey()


LEVELS = torch.linspace(-1, 1, 64)[:, None, None, None].expand(-1, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> QuantizedModel:
    return quantize(model, Recipe("w8a8"), LEVELS.split(8))


def _validate(model: Any, folder: Path, **more: Any) -> dict[str, Any]:
    return vitzoo.validate(model, folder, **{"workers": 0, "batch_size": 5, **more}).to_row()


def test_a_module(model: nn.Module, folder: Path) -> None:
    model.train()
    row = _validate(model, folder)
    assert model.training
    assert row.items() >= EXPECTED.items()
    assert [*row][1:10] == [
        "model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"
    ]  # fmt: skip
    assert (row["model"], row["images"], row["classes"], row["img_size"]) == ("grey", 24, 6, SIDE)
    assert (
        row.items()
        >= {"crop_pct": 1.0, "interpolation": "bilinear", "skipped": 0, "saturates": False}.items()
    )
    assert _validate(model, folder, batch_size=24)["top5"] == EXPECTED["top5"]


def test_a_float_file_says_itself_how_images_are_prepared(
    model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    vitzoo.export_onnx(model, tmp_path / "m.onnx", SIDE)
    row = _validate(tmp_path / "m.onnx", folder)
    assert (
        row.items() >= {**EXPECTED, "model": "m.onnx", "crop_pct": 1.0, "interpolation": "bilinear"}.items()
    )
    changed = _validate(tmp_path / "m.onnx", folder, preprocessing={"mean": [1.0] * 3, "crop_pct": 0.9})
    assert changed["crop_pct"] == 0.9
    assert changed["top1"] < EXPECTED["top1"]


def test_a_quantized_file_and_its_json_file(
    model: nn.Module, quantized: QuantizedModel, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    export_quantized(model, quantized, path, image((4, 3, SIDE, SIDE)), "x86-avx2", ANYTHING)
    assert _validate(path, folder).items() >= EXPECTED.items()
    beside = json.loads(path.with_suffix(".json").read_text())
    # what it says of preprocessing counts, and its labels number the folders
    beside["preprocessing"]["crop_pct"] = 0.95
    beside["label_names"] = ["11", "20", "100", "1", "2", "10"]
    path.with_suffix(".json").write_text(json.dumps(beside))
    row = _validate(path, folder)
    assert row["crop_pct"] == 0.95
    assert row["top1"] == pytest.approx(0, abs=5)
    path.with_suffix(".json").write_text(json.dumps({**beside, "sha256": "0"}))
    with pytest.raises(ValueError, match="describes another file"):
        _validate(path, folder)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        _validate(path, folder)


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".xml", marks=NEEDS_OPENVINO)])
def test_archives_and_irs(suffix: str, model: nn.Module, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    export_model(model, path, input_size=SIDE)
    row = _validate(path, folder)
    told = {**EXPECTED, "model": path.name, "crop_pct": 1.0, "interpolation": "bilinear", "saturates": False}
    assert row.items() >= told.items()
    file = read_exported(path)
    assert (file.shape, file.num_classes, file.target) == ((None, 3, SIDE, SIDE), 6, None)
    assert file.params >= 24
    with pytest.raises(ValueError, match="takes images of 16x16, not 32x32"):
        _validate(path, folder, img_size=32)
    other = tmp_path / f"int8{suffix}"
    quantized = quantize(model, Recipe("w7a8", reduce_range=True), LEVELS.split(8))
    export_quantized(model, quantized, other, image((4, 3, SIDE, SIDE)), "x86-avx2", ANYTHING)
    assert _validate(other, folder).items() >= {**EXPECTED, "saturates": False}.items()
    assert read_exported(other).target == "x86-avx2"
    if suffix == ".xml":  # what holds its weights is a part of it
        weights = other.with_suffix(".bin")
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"describes another file than .*int8\.bin"):
            _validate(other, folder)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no .*int8\.bin, which is a part of"):
            _validate(other, folder)
        other.with_suffix(".json").unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no .*int8\.bin, which has the weights of"):
            _validate(other, folder)
    path.with_suffix(".json").unlink()
    if suffix == ".pt2":  # an archive has its own copy
        assert _validate(path, folder).items() >= told.items()
    else:
        with pytest.raises(ValueError, match=r"there is no m\.json beside it: give mean and std"):
            _validate(path, folder)
    path.write_text("nothing")
    with pytest.raises(ExportError, match=r"cannot (load|read) .*m"):
        _validate(path, folder)


@NEEDS_OPENVINO
@pytest.mark.parametrize("name", ["full", "reduced"])
def test_an_ir_for_vnni_is_told_from_one_for_avx2(
    files: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "m.xml"
    convert_onnx(files / f"{name}.onnx", path)
    assert len(read_exported(path).saturates) == 2 * (name == "full")
    monkeypatch.setattr(accuracy, "this_machine", lambda: "x86-avx2")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        row = _validate(path, folder, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert row["saturates"] == (name == "full")
    assert ["saturates silently" in str(w.message) for w in said] == [True] * (name == "full")


def test_a_foreign_file_needs_to_be_told(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "m.onnx"
    vitzoo.export_onnx(model, path, SIDE)
    file = onnx.load(str(path))
    del file.metadata_props[:]
    onnx.save(file, str(path))
    with pytest.raises(ValueError, match=r"there is no m\.json beside it: give mean and std"):
        _validate(path, folder)
    told = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert _validate(path, folder, preprocessing=told).items() >= EXPECTED.items()
    with pytest.raises(ValueError, match="takes images of 16x16, not 32x32"):
        _validate(path, folder, preprocessing=told, img_size=32)
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(file, str(path))
    row = _validate(path, folder, preprocessing=told)
    assert row.items() >= {**EXPECTED, "batch_size": 7}.items()


FILES = {  # name -> activations, target, weights of seven bits
    "full": ("static", "x86-vnni", False),
    "dynamic": ("dynamic", "x86-vnni", False),
    "reduced": ("static", "x86-vnni", True),
    "unsigned": ("dynamic", "x86-avx2", False),
    "signed": ("static", "arm", False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Linear(Grey):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model, batches = Linear(), [image((8, 3, SIDE, SIDE))]
    for name, (activations, target, reduced) in FILES.items():
        quantized = quantize(model, Recipe(name, activations=activations, reduce_range=reduced), batches)
        write_quantized(quantized, folder / f"{name}.onnx", model, target)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("here", ["x86-avx2", "x86-vnni"])
@pytest.mark.parametrize("told", [True, False], ids=["json", "bare"])
def test_a_file_for_vnni_is_told_from_one_for_avx2(
    files: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    here: str,
    told: bool,
) -> None:
    import onnx

    path, target = tmp_path / f"{name}.onnx", FILES[name][1]
    model = onnx.load(str(files / path.name))
    if told:
        path.with_suffix(".json").write_text(json.dumps({"target": target}))
        notes = [entry for entry in model.metadata_props if entry.key != "vitzoo.target"]
    else:
        notes = []
    del model.metadata_props[:]
    model.metadata_props.extend(notes)
    onnx.save(model, str(path))
    full_range = name in ("full", "dynamic", "signed")
    assert len(read_exported(path).saturates) == 2 * full_range  # the convolution and the linear layer
    monkeypatch.setattr(accuracy, "this_machine", lambda: here)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        row = _validate(path, folder, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert row["saturates"] == (full_range and here == "x86-avx2")
    messages = [str(warning.message) for warning in said]
    assert ["saturates silently" in message for message in messages] == [True] * row["saturates"]
    assert all((f"it was made for {target}" in message) == told for message in messages)


def test_images_that_cannot_be_read_are_skipped_and_counted(model: nn.Module, folder: Path) -> None:
    (folder / "2" / "1.png").write_bytes(b"broken")
    whole = (folder / "1" / "deeper" / "3.PNG").read_bytes()
    (folder / "1" / "deeper" / "3.PNG").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="is skipped"):
        found = vitzoo.validate(model, folder, workers=1)
    assert {Path(path).name for path in found.skipped} == {"1.png", "3.PNG"}
    assert found.images == 22
    assert found.top1 == pytest.approx(100 * 17 / 22, abs=1e-4)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(ValueError, match="none of the 24 images below"),
    ):
        _validate(model, folder)


def test_folders_that_are_not_the_classes_are_refused(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="not a folder with one subfolder a class"):
        _validate(model, tmp_path / "none")
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        _validate(model, tmp_path / "flat")
    shutil.rmtree(folder / "10")
    with pytest.raises(ValueError, match="has 5 class folders and the model 6 classes"):
        _validate(model, folder)
    (folder / "10").mkdir()
    with pytest.raises(ValueError, match="class folders without images: 10; fill or remove them"):
        _validate(model, folder)
    with pytest.raises(ValueError, match="preprocessing has gamma, expected some of mean, std"):
        _validate(model, folder, preprocessing={"gamma": 1})
    with pytest.raises(ValueError, match="has num_classes 0"):
        _validate(nn.Identity(), folder)


def test_a_class_map_numbers_the_folders(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "10")
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES) + "\n")
    assert _validate(model, folder, class_map=names)["top1"] == 75
    names.write_text("\n".join(CLASSES[:4]))
    with pytest.raises(ValueError, match=r"the lines of .*classes.txt do not name: 20, 100"):
        _validate(model, folder, class_map=names)
    names.write_text("\n".join(["a"] * 5 + [*CLASSES]))
    with pytest.raises(ValueError, match="number 2, 11, 20, 100 beyond the model's 6 classes"):
        _validate(model, folder, class_map=names)
    with pytest.raises(ValueError, match=r"is not a \.txt file"):
        _validate(model, folder, class_map=tmp_path / "map.pkl")
    with pytest.raises(FileNotFoundError, match="there is no class map"):
        _validate(model, folder, class_map=tmp_path / "map.txt")


def test_synsets_number_a_part_of_imagenet(tmp_path: Path) -> None:
    class Constant(nn.Module):
        num_classes = 1000
        pretrained_cfg = {"input_size": (3, SIDE, SIDE)}

        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(1000)[[217] * len(x)]

    for synset in ("n02102040", "n03000684", "n03888257"):  # springer, chain saw, parachute
        _paint(tmp_path / synset / "0.png", 1)
    assert _validate(Constant(), tmp_path)["top1"] == pytest.approx(100 / 3, abs=1e-3)
    (tmp_path / "cat").mkdir()
    _paint(tmp_path / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match="that the synsets of imagenet-1k do not name: cat"):
        _validate(Constant(), tmp_path)


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["validate", *map(str, arguments), "--workers", "0"])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_the_command_and_its_files(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    vitzoo.export_onnx(model, tmp_path / "m.onnx", SIDE)
    (folder / "2" / "1.png").write_bytes(b"broken")
    files = ["-o", tmp_path / "r.jsonl", "--csv", tmp_path / "r.csv"]
    code, out, err = _run(tmp_path / "m.onnx", "--data", folder, *files, "--json")
    assert code == 0, err
    row = json.loads(out)
    assert (row["images"], row["skipped"]) == (23, 1)
    assert "1.png is skipped" in err
    assert "1 images could not be read" in err
    (_, head), (_, written) = read_rows(tmp_path / "r.jsonl")
    assert head["validate"]["data"] == str(folder)
    assert head["machine"]["cpu"]["flags"]
    assert written.items() >= row.items()
    assert written["kind"] == "validation"
    assert read_results(tmp_path / "r.jsonl").rows == []
    with (tmp_path / "r.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert [*line][:3] == ["model", "top1", "top1_err"]
    assert float(line["top1"]) == row["top1"]
    code, _, err = _run(tmp_path / "m.onnx", "--data", folder, *files)
    assert code == 1
    assert "the output exists; choose another or say --force" in err
    code, out, err = _run(tmp_path / "m.onnx", "--data", folder, *files, "--force", "--std", "0.5,0.5,0.5")
    assert code == 0, err
    assert "top5_err" in out


def test_the_command_takes_a_name_and_its_weights(folder: Path, tmp_path: Path) -> None:
    small = ["deit_tiny_patch16_224", "--img-size", "32", "-k", "depth=1", "-k", "num_classes=6"]
    torch.manual_seed(0)
    model = vitzoo.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=6)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    code, out, err = _run(*small, "--checkpoint", tmp_path / "w.pth", "--data", folder, "--json")
    assert code == 0, err
    row = json.loads(out)
    expected = _validate(model, folder, img_size=32)
    same = ("top1", "top5", "param_count", "img_size", "crop_pct", "interpolation", "images")
    assert [row[key] for key in same] == [expected[key] for key in same]
    assert row["model"] == "deit_tiny_patch16_224"
    code, _, err = _run("deit_tiny_patch16_22", "--data", folder)
    assert code == 1
    assert "did you mean" in err
    code, _, err = _run(tmp_path / "none.onnx", "--data", folder)
    assert code == 1
    assert "there is no file" in err
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    code, _, err = _run(tmp_path / "bad.onnx", "--data", folder)
    assert code == 1
    assert "is not an ONNX file" in err
    code, _, err = _run("x", "--data", folder, "--mean", "0.5,half")
    assert code == 2
