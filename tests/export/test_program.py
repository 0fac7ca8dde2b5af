"""torch.export archives give eager's numbers in a fresh process with vitzoo alone, and appear whole or not at all."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitzoo
from vitzoo.export import ExportError, common
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe
from vitzoo.testing import image, relative_difference

# a shallow model of each family with all its kinds of layers, and the operators of ours that it runs on
FAMILIES = {
    "cvt_13": ({"depths": (1, 1, 1)}, set()),
    "evit_tiny_patch16_224": (
        {"img_size": 64, "depth": 3, "drop_loc": (1,), "fuse_token": True},
        {"attention_with_scores", "reorganize_tokens"},
    ),
    "litv2_small": ({"depths": (1, 1, 1, 1)}, {"window_attention", "pooled_attention"}),
    "vim_tiny_patch16_224": ({"img_size": 64, "depth": 2}, {"bidirectional_selective_scan", "causal_conv1d"}),
}


class Tiny(nn.Module):
    """A classifier; on request with a batch turned into a constant, or with other numbers in the graph."""

    num_classes = 5

    def __init__(self, wrong: bool = False, fixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.wrong, self.fixed = wrong, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        if self.fixed:
            x = x * torch.ones(2, 1)
        if self.wrong and torch.compiler.is_exporting():
            x = x * 1.001
        return self.head(x)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("cvt_13", "litv2_small") else n for n in FAMILIES],
)
def test_every_family_keeps_its_operators(name: str, tmp_path: Path) -> None:
    kwargs, operators = FAMILIES[name]
    torch.manual_seed(0)
    model = vitzoo.create_model(name, num_classes=10, **kwargs)
    report = vitzoo.export_program(model, tmp_path / "m.pt2", input_size=64)
    assert report.max_relative_difference < 1e-6
    assert report.batches == (1, 3)
    assert {f"vitzoo.{operator}.default" for operator in operators} <= {*report.nodes}
    assert report.size_bytes == (tmp_path / "m.pt2").stat().st_size
    assert report.outputs == ("logits",)
    assert model.training


def test_a_fresh_process_needs_vitzoo_alone(tmp_path: Path) -> None:
    """An integer model with a scan: saved here, loaded where neither its class nor a compiler is asked for."""
    torch.manual_seed(0)
    model = vitzoo.create_model("vim_tiny_patch16_224", num_classes=7, img_size=32, depth=1).eval()
    quantized = quantize(model, Recipe("r"), [image((2, 3, 32, 32))])
    converted = vitzoo.convert_int8(model, quantized)
    report = vitzoo.export_program(converted, tmp_path / "m.pt2", converted.input_size)
    assert report.nodes["vitzoo.int8_linear.default"] == len(converted.int8_layers)
    assert "aten.linear.default" not in report.nodes
    x = image((5, 3, 32, 32), 3)
    with torch.no_grad():
        torch.save({"x": x, "out": converted(x)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, vitzoo; saved = torch.load('expected.pt', weights_only=True);"
        "module = torch.export.load('m.pt2').module();"
        "sizes = [len(module(saved['x'][:n])) for n in (1, 3, 5)];"
        "worst = (module(saved['x']) - saved['out']).abs().max();"
        "print(sizes, float(worst), 'torchao' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[1, 3, 5] 0.0 False False", done.stderr


def test_the_archive_says_what_it_is_and_names_no_path(tmp_path: Path) -> None:
    vitzoo.export_program(Tiny(), tmp_path / "m.pt2", input_size=16)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    notes = json.loads(content["m/extra/vitzoo.json"])
    assert notes["input"]["shape"] == ["batch", 3, 16, 16]
    assert notes["num_classes"] == 5
    assert notes["preprocessing"]["mean"] == list(timm.data.IMAGENET_DEFAULT_MEAN)
    for word in (Path(__file__).parent, Path(torch.__file__).parent, Path(vitzoo.__file__).parent):
        assert not [entry for entry, data in content.items() if str(word).encode() in data]
    assert max(map(len, content.values())) < 2**17, "example images were stored"


@pytest.mark.parametrize(("name", "other"), [("cvt_13", (80, 112)), ("mobilenetv3_small_050", (77, 50))])
def test_a_dynamic_size(name: str, other: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    kwargs = {"depths": (1, 1, 1)} if name == "cvt_13" else {}
    model = vitzoo.create_model(name, **kwargs).eval()
    report = vitzoo.export_program(model, tmp_path / "m.pt2", input_size=64, dynamic_size=True)
    assert report.dynamic_size
    module = torch.export.load(tmp_path / "m.pt2").module()
    x = image((2, 3, *other))
    with torch.no_grad():
        assert relative_difference(module(x), model(x)) < 1e-5


def test_a_size_that_the_design_fixes_is_refused(tmp_path: Path) -> None:
    model = vitzoo.create_model("evit_tiny_patch16_224", depth=1, drop_loc=(), img_size=32)
    with pytest.raises(
        ExportError,
        match=r"EViT takes images of 32x32 pixels only, so its height and width cannot be dynamic: ",
    ):
        vitzoo.export_program(model, tmp_path / "m.pt2", dynamic_size=True, input_size=32)
    assert os.listdir(tmp_path) == []


def test_refusals_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("older")
    for model, words in (
        (Tiny(wrong=True), "differs from eager by"),
        (Tiny(fixed=True), "cannot be exported"),
    ):
        with pytest.raises(ExportError, match=words):
            vitzoo.export_program(model, path, input_size=16)
    with pytest.raises(ValueError, match=r"the archive's name is 'm\.pt', expected one that ends in \.pt2"):
        vitzoo.export_program(Tiny(), tmp_path / "m.pt", input_size=16)
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        vitzoo.export_program(Tiny(), tmp_path / "none" / "m.pt2", input_size=16)
    assert os.listdir(tmp_path) == ["m.pt2"]
    assert path.read_text() == "older"


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> float:
        raise KeyboardInterrupt

    (tmp_path / "m.pt2").write_text("older")
    monkeypatch.setattr(common, "largest_difference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vitzoo.export_program(Tiny(), tmp_path / "m.pt2", input_size=16)
    assert os.listdir(tmp_path) == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "older"
