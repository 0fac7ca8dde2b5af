"""Files of every format come with a JSON file that is true of them, both whole or neither."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitzoo
from vitzoo.deploy import GateError, Thresholds, export_model, export_quantized, formats, openvino_coverage
from vitzoo.deploy import gate as gate_module
from vitzoo.deploy.formats import FORMATS, format_of
from vitzoo.export import ExportError, files
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.model import QuantizedModel
from vitzoo.testing import image, relative_difference

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

SIZE = 32
HELD_BACK = image((4, 3, SIZE, SIZE), 9)
NEEDS_OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs OpenVINO: pip install 'vitzoo[openvino]'"
)
KINDS = [pytest.param(f, id=f.name, marks=NEEDS_OPENVINO if f.name == "openvino" else ()) for f in FORMATS]


def _model(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model(
        "deit_tiny_patch16_224", depth=2, img_size=SIZE, num_classes=5, **kwargs
    ).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return _model()


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> QuantizedModel:
    return quantize(model, Recipe("r", reduce_range=True), [image((4, 3, SIZE, SIZE), 1)])


def _check_hashes(folder: Path, facts: dict[str, Any]) -> None:
    entries = {facts["file"]: facts, **facts.get("companions", {})}
    assert {*entries, f"{Path(facts['file']).stem}.json"} == {*os.listdir(folder)}
    for name, entry in entries.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert entry["bytes"] == (folder / name).stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_model_and_its_facts(kind: formats.Format, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"m{kind.suffix}"
    report = export_model(model, path, input_size=SIZE)
    facts = json.loads((tmp_path / "m.json").read_text())
    _check_hashes(tmp_path, facts)
    assert report.path == path
    assert report.format == facts["format"] == kind.name
    assert facts["opset"] == (20 if kind.has_opset else None)
    assert facts["input"]["shape"] == ["batch", 3, SIZE, SIZE]
    assert facts["num_classes"] == 5
    assert facts["preprocessing"]["interpolation"] == "bicubic"
    assert facts["integer_coverage"] == 0
    assert facts["parity"]["runtime"] == kind.runtime
    assert facts["parity"]["max_relative_difference"] == report.max_relative_difference < 1e-5
    assert facts["machine"]["cpu"]
    with torch.no_grad():
        assert relative_difference(kind.open(path, 1)(HELD_BACK)[0], model(HELD_BACK)) < 1e-5


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time files for a moment: what is tested here is not their speed."""
    monkeypatch.setattr(gate_module, "SECONDS", 0.05)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", KINDS[1:])  # of ONNX, tests/export/test_quantized.py does
def test_an_integer_model_and_its_facts(
    kind: formats.Format, model: nn.Module, quantized: QuantizedModel, tmp_path: Path
) -> None:
    anything = Thresholds(coverage=0.8, speed=0.0)
    gate = export_quantized(
        model, quantized, tmp_path / f"m{kind.suffix}", HELD_BACK, "x86-avx2", anything, threads=1
    )
    facts = json.loads((tmp_path / "m.json").read_text())
    _check_hashes(tmp_path, facts)
    assert facts["format"] == kind.name
    assert facts["integer_coverage"] == gate.coverage > 0.8
    assert facts["parity"]["logit_error"] == gate.logit_error
    assert facts["target"] == "x86-avx2"
    assert 1e-4 < gate.logit_error < 0.1
    assert gate.simulation_error < gate.logit_error
    x = image((3, 3, SIZE, SIZE), 4)
    with torch.no_grad():
        exact = model(x)
    out = kind.open(tmp_path / f"m{kind.suffix}", 1)(x)[0]
    assert 1e-4 < relative_difference(out, exact) < 0.1


@pytest.mark.slow  # of ONNX, tests/export/test_quantized.py does
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_missed_threshold_keeps_the_float_file(
    kind: formats.Format, model: nn.Module, quantized: QuantizedModel, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match="below 1000") as caught:
        export_quantized(
            model,
            quantized,
            tmp_path / f"m{kind.suffix}",
            HELD_BACK,
            "x86-avx2",
            Thresholds(speed=1000),
            threads=1,
        )
    kept = caught.value.float_path
    assert kept == tmp_path / f"m.float{kind.suffix}"
    assert {*os.listdir(tmp_path)} == {kept.name, *(["m.float.bin"] if kind.suffix == ".xml" else [])}
    with torch.no_grad():
        assert relative_difference(kind.open(kept, 1)(HELD_BACK)[0], model(HELD_BACK)) < 1e-5


def test_a_converted_model_is_exported_with_its_coverage(
    model: nn.Module, quantized: QuantizedModel, tmp_path: Path
) -> None:
    converted = vitzoo.convert_int8(model, quantized)
    export_model(converted, tmp_path / "m.pt2", input_size=converted.input_size)
    facts = json.loads((tmp_path / "m.json").read_text())
    linear = sum(layer.macs for layer in converted.layers if layer.mode == "static")
    assert facts["integer_coverage"] == pytest.approx(linear / sum(layer.macs for layer in converted.layers))
    assert facts["architecture"] == "deit_tiny_patch16_224"


@NEEDS_OPENVINO
@pytest.mark.slow
def test_openvino_counts_products_by_weights_that_it_decompresses(model: nn.Module, tmp_path: Path) -> None:
    """Unsigned weights run in float there: counted so, and refused before."""
    full = quantize(model, Recipe("full"), [HELD_BACK])
    write_quantized(full, tmp_path / "m.onnx", model, "x86-avx2")
    found = openvino_coverage(tmp_path / "m.onnx", HELD_BACK[:1])
    assert found.share < 0.1
    assert found.total_macs == sum(site.macs for site in full.sites)
    with pytest.raises(ValueError, match="which OpenVINO runs in float; quantize with reduce_range = true"):
        export_quantized(model, full, tmp_path / "m.xml", HELD_BACK, "x86-avx2")
    assert os.listdir(tmp_path) == ["m.onnx"]


@NEEDS_OPENVINO
def test_openvino_counts_attention_and_refuses_what_it_cannot_see(model: nn.Module, tmp_path: Path) -> None:
    vitzoo.export_openvino(model, tmp_path / "m.xml", SIZE)
    tokens, width = (SIZE // 16) ** 2 + 1, 192
    block = tokens * width * width * 12 + 2 * tokens * tokens * width
    macs = 2 * block + (tokens - 1) * width * 3 * 256 + 5 * width
    for batch in (1, 3):
        found = openvino_coverage(tmp_path / "m.xml", HELD_BACK[:batch])
        assert found.total_macs == batch * macs
        assert found.integer_macs == 0
    torch.manual_seed(0)
    scan = vitzoo.create_model("vim_tiny_patch16_224", depth=1, img_size=SIZE, num_classes=5)
    export_model(scan, tmp_path / "v.xml", input_size=SIZE)
    facts = json.loads((tmp_path / "v.json").read_text())
    assert facts["integer_coverage"] is None
    assert facts["integer_coverage_unknown"] == "v.xml runs TensorIterator, whose products cannot be counted"


@NEEDS_OPENVINO
def test_compiled_models_may_go_in_any_order(model: nn.Module, tmp_path: Path) -> None:
    """OpenVINO's stack for signal handlers outlives them: a child's end once ended the process."""
    vitzoo.export_openvino(model, tmp_path / "m.xml", SIZE, check=False)
    code = """
import signal, subprocess
from vitzoo.export.openvino import compile_openvino
first, second = compile_openvino("m.xml"), compile_openvino("m.xml")
del first
del second
handled = []
signal.signal(signal.SIGCHLD, lambda *args: handled.append(args))
subprocess.run(["true"], capture_output=True)
assert handled
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@NEEDS_OPENVINO
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cvt_13", {"depths": (1, 1, 2)}),
        ("evit_tiny_patch16_224", {"img_size": 64, "depth": 4, "drop_loc": (1, 2), "fuse_token": True}),
        ("vim_tiny_patch16_224", {"img_size": 64, "depth": 4}),
        ("twins_svt_small_poly", {"depths": (1, 1, 1, 1)}),
        ("vit_small_patch16_224_poly", {"depth": 2}),
        ("convnext_atto", {}),
        ("efficientvit_m0", {}),
    ],
)
def test_every_family_runs_in_openvino(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name, **kwargs)
    size = 64 if name.split("_")[0] in ("cvt", "evit", "litv2", "vim", "convnext") else 224
    report = vitzoo.export_openvino(model, tmp_path / "m.xml", size)
    assert report.max_relative_difference < 1e-4


@NEEDS_OPENVINO
@pytest.mark.slow
def test_what_openvino_has_no_operation_for_is_named(tmp_path: Path) -> None:
    model = vitzoo.create_model("litv2_small", depths=(1, 1, 1, 1))
    with pytest.raises(
        ExportError, match="OpenVINO cannot read the ONNX form: it has no operation for DeformConv-20"
    ):
        vitzoo.export_openvino(model, tmp_path / "m.xml", 64)
    assert os.listdir(tmp_path) == []


@NEEDS_OPENVINO
def test_an_ir_with_wrong_numbers_is_refused(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a converter gets wrong, as OpenVINO does scans of a fixed batch, never gets a name."""
    import openvino

    from vitzoo.export import openvino as ours

    real = openvino.save_model

    def corrupted(ir: Any, path: str, **kwargs: Any) -> None:
        real(ir, path, **kwargs)
        weights = Path(path).with_suffix(".bin")
        content = bytearray(weights.read_bytes())
        content[-4000:] = bytes(4000)
        weights.write_bytes(content)

    monkeypatch.setattr(openvino, "save_model", corrupted)
    with pytest.raises(ExportError, match=r"differs from eager by .* in OpenVINO, more than 1e-04"):
        export_model(model, tmp_path / "m.xml", input_size=SIZE)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"the IR's name is 'm\.ir', expected one that ends in \.xml"):
        ours.convert_onnx(tmp_path / "m.onnx", tmp_path / "m.ir")


def test_openvino_missing_names_its_install_line(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "openvino" else find(n, *a))
    with pytest.raises(
        ImportError, match=r"needs openvino, not installed here: pip install 'vitzoo\[openvino\]'"
    ):
        export_model(model, tmp_path / "m.xml", input_size=SIZE)
    assert os.listdir(tmp_path) == []


def test_formats_are_found_by_name_and_suffix() -> None:
    assert format_of(None).name == "onnx"
    assert format_of("a/m.pt2").name == "torch-export"
    assert format_of(None, "openvino").suffix == ".xml"
    with pytest.raises(ValueError, match=r"there is no format 'tflite'; formats: onnx \(\.onnx\), "):
        format_of("m.onnx", "tflite")
    with pytest.raises(ValueError, match=r"'m\.pt' says no format by its suffix; formats: "):
        format_of("m.pt")
    with pytest.raises(ValueError, match=r"'m\.pt2' is not of format onnx by its suffix"):
        format_of("m.pt2", "onnx")


def test_facts_of_another_file_are_not_replaced(model: nn.Module, tmp_path: Path) -> None:
    export_model(model, tmp_path / "m.pt2", input_size=SIZE, check=False)
    before = (tmp_path / "m.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"describes m\.pt2; choose another name than m\.onnx"):
        export_model(model, tmp_path / "m.onnx", input_size=SIZE)
    assert (tmp_path / "m.json").read_bytes() == before
    assert {*os.listdir(tmp_path)} == {"m.json", "m.pt2"}
    export_model(model, tmp_path / "m.pt2", input_size=SIZE, check=False)  # its own are


@pytest.mark.parametrize("at", [pytest.param("write", marks=pytest.mark.slow), "publish"])
def test_a_killed_process_leaves_no_file_beside_facts_of_another(at: str, tmp_path: Path) -> None:
    """SIGKILL before the files get their names, and between the two renames."""
    (tmp_path / "m.pt2").write_text("older")
    (tmp_path / "m.json").write_text('{"file": "m.pt2"}')
    code = f"""
import os, signal, vitzoo
from vitzoo.deploy import export_model
from vitzoo.export import files
rename, done = os.replace, []
def replace(*args):
    if {at!r} == "write" or done:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
    done.append(args)
os.replace = replace
model = vitzoo.create_model("deit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
export_model(model, "m.pt2", input_size=32, check=False)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    named = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    if "m.pt2" in named:
        assert (tmp_path / "m.pt2").read_text() == "older"
        assert json.loads((tmp_path / "m.json").read_text()) == {"file": "m.pt2"}
    else:
        assert named == {"m.json"}


def test_a_folder_in_the_way_moves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("m.xml", "m.bin", "m.json"):
        (scratch / name).write_text("new")
    (tmp_path / "m.xml").write_text("older")
    (tmp_path / "m.json").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder has this name"):
        files.publish(scratch, tmp_path / "m.xml")
    assert (tmp_path / "m.xml").read_text() == "older"
    assert not (tmp_path / "m.bin").exists()
