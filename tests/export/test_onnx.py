"""ONNX files give eager's numbers, leave the model as it was, and appear whole or not at all."""

import functools
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitzoo
from vitzoo.export import ExportError, check, common, onnx
from vitzoo.layers.attention import PlainAttention
from vitzoo.testing import image, relative_difference

ort = pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

# a shallow model of each family with all its kinds of layers, on a small image where it takes one; test_every_variant
# takes them as published
QUICK = {
    "cvt": ("cvt_13", {"depths": (1, 1, 2)}, 96),
    "evit": (
        "evit_tiny_patch16_224",
        {"img_size": 96, "depth": 4, "drop_loc": (1, 2), "fuse_token": True},
        96,
    ),
    "litv2": ("litv2_small", {"depths": (1, 1, 2, 1)}, 64),
    "vim": ("vim_tiny_patch16_224", {"img_size": 64, "depth": 4}, 64),
    "twins_poly": ("twins_svt_small_poly", {"depths": (1, 1, 2, 1)}, 224),
    "vit_poly": ("vit_small_patch16_224_poly", {"depth": 3}, 224),
}
OURS = [m for f in vitzoo.registry.families() if f.origin == "vitzoo" for m in f.models]


class Tiny(nn.Module):
    """A classifier with a module of its own mode, and attention of five axes."""

    num_classes = 5

    def __init__(self, wrong: bool = False, fixed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.wrong, self.fixed = wrong, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)  # (B, L, C)
        if self.fixed:
            x = x * torch.ones(2, 1, 1)
        q = x.reshape(len(x), 1, 1, -1, 8)
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril() if self.wrong else None
        x = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).flatten(1, 3)
        if self.wrong and torch.compiler.is_exporting():
            x = x * 1.001
        return self.head(self.drop(x.mean(1)))


def _session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _assert_agrees(model: nn.Module, path: Path, size: tuple[int, ...]) -> None:
    model.eval()
    session = _session(path)
    for batch in (1, 3):
        x = image((batch, *size), seed=batch)
        with torch.no_grad():
            expected = model(x)
        (out,) = session.run(None, {"input": x.numpy()})
        assert relative_difference(out, expected) <= 1e-4, f"batch {batch}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    vitzoo.export_onnx(Tiny(), path, input_size=16)
    return path


def _quick(family: str) -> tuple[str, dict, int | None]:
    first = {f.name: next(iter(f.models)) for f in vitzoo.registry.families()}
    return QUICK.get(family, (first[family], {}, None))


@pytest.mark.parametrize("family", [f.name for f in vitzoo.registry.families() if f.origin == "vitzoo"])
def test_every_family(family: str, tmp_path: Path) -> None:
    name, kwargs, size = _quick(family)
    torch.manual_seed(0)
    model = vitzoo.create_model(name, **kwargs)
    report = vitzoo.export_onnx(model, tmp_path / "m.onnx", input_size=size)
    assert report.max_relative_difference is not None
    assert report.max_relative_difference <= 1e-4
    _assert_agrees(model, report.path, report.input_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_variant(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name)
    report = vitzoo.export_onnx(model, tmp_path / "m.onnx")
    assert report.input_size == tuple(model.pretrained_cfg["input_size"])
    _assert_agrees(model, report.path, report.input_size)


def test_threads_of_a_session_sleep_between_calls(tmp_path: Path) -> None:
    vitzoo.export_onnx(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), tmp_path / "m.onnx", 8, check=False
    )
    options = check.open_session(tmp_path / "m.onnx", threads=1).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 1


@pytest.mark.parametrize("depth", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_vim_has_one_scan_a_layer(depth: int, tmp_path: Path) -> None:
    kwargs = {"img_size": 64, "depth": depth} if depth < 24 else {}
    model = vitzoo.create_model("vim_tiny_patch16_224", **kwargs)
    report = vitzoo.export_onnx(model, tmp_path / "vim.onnx", check=False)
    assert report.nodes["Scan"] == depth
    assert report.seconds < 120


@pytest.mark.parametrize("name", ["twins_svt_small", "mobilenetv3_small_050"])
def test_models_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **({"depths": (1, 1, 1, 1)} if "twins" in name else {}))
    report = vitzoo.export_onnx(model, tmp_path / "m.onnx", input_size=(64, 96) if "mobile" in name else 224)
    assert report.input_size == ((3, 64, 96) if "mobile" in name else (3, 224, 224))
    _assert_agrees(model, report.path, report.input_size)


def test_feature_maps_are_several_outputs(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", features_only=True)
    report = vitzoo.export_onnx(model, tmp_path / "m.onnx", input_size=64)
    assert report.outputs == tuple(f"output_{i}" for i in range(5))
    x = image((3, 3, 64, 64))
    with torch.no_grad():
        expected = model.eval()(x)
    outputs = _session(report.path).run(None, {"input": x.numpy()})
    assert [out.shape[0] for out in outputs] == [3] * 5
    assert max(map(relative_difference, outputs, expected)) <= 1e-4


def test_report_and_names(tiny: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    report = vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", input_size=16, opset=18, progress=steps.append)
    assert (report.opset, report.outputs, report.batches) == (18, ("logits",), (1, 3))
    assert report.size_bytes == (tmp_path / "t.onnx").stat().st_size
    assert report.nodes["Softmax"] == report.nodes["Conv"] == 1
    assert report.to_dict()["path"] == str(tmp_path / "t.onnx")
    assert steps[0] == "run the model"
    assert steps[-1] == "compare with eager at batch 3"
    session = _session(tiny)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("input", ["batch", 3, 16, 16])]
    assert [(o.name, o.shape[1]) for o in session.get_outputs()] == [("logits", 5)]
    notes = session.get_modelmeta().custom_metadata_map
    assert notes["input_size"] == "(3, 16, 16)"
    assert notes["architecture"] == "Tiny"


def test_file_holds_no_path_of_this_machine(tiny: Path) -> None:
    content = tiny.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = Tiny().train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    vitzoo.export_onnx(model, tmp_path / "t.onnx", input_size=16)
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(image((2, 3, 16, 16))).sum().backward()
    assert float(model.conv.weight.grad.norm()) > 0


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", input_size=16)
    assert capfd.readouterr() == ("", "")


def test_weights_beyond_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "SINGLE_FILE_BYTES", 100)
    model = Tiny()
    report = vitzoo.export_onnx(model, tmp_path / "t.onnx", input_size=16)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["t.onnx", "t.onnx.data"]
    assert report.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    _assert_agrees(model, report.path, (3, 16, 16))


def test_attention_spelt_out_is_the_fused_one() -> None:
    q, k, v = image((2, 3, 4, 6, 8), 1), image((2, 3, 4, 5, 8), 2), image((2, 3, 4, 5, 8), 3)
    fused = nn.functional.scaled_dot_product_attention
    keep = image((6, 5), 4) > -0.5
    for kwargs in (
        {},
        {"attn_mask": image((6, 5), 4)},
        {"attn_mask": keep},
        {"is_causal": True},
        {"scale": 0.7},
    ):
        with PlainAttention():
            out = nn.functional.scaled_dot_product_attention(q, k, v, **kwargs)
        assert relative_difference(out, fused(q, k, v, **kwargs)) < 1e-6, kwargs


def test_wrong_numbers_are_refused_and_removed(tmp_path: Path) -> None:
    (tmp_path / "t.onnx").write_text("older")
    with pytest.raises(
        ExportError, match=r"differs from eager by .*e-0\d \(relative\) in ONNX Runtime, more"
    ):
        vitzoo.export_onnx(Tiny(wrong=True), tmp_path / "t.onnx", input_size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["t.onnx"]
    assert (tmp_path / "t.onnx").read_text() == "older"


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = Tiny()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ExportError, match="differs from eager"):
        vitzoo.export_onnx(model, tmp_path / "t.onnx", input_size=16)
    assert list(tmp_path.iterdir()) == []


class Untranslatable(Tiny):
    """Branches on a value, which no graph holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def test_what_cannot_be_translated_leaves_nothing(tmp_path: Path) -> None:
    model = Untranslatable().train()
    with pytest.raises(ExportError, match="Untranslatable cannot be translated to ONNX: "):
        vitzoo.export_onnx(model, tmp_path / "t.onnx", input_size=16)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="inferred a static shape of 2"):
        vitzoo.export_onnx(Tiny(fixed=True), tmp_path / "t.onnx", input_size=16)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "largest_difference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", input_size=16)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        vitzoo.export_onnx(Tiny(), tmp_path / "none" / "t.onnx", input_size=16)


def test_path_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        vitzoo.export_onnx(Tiny(), tmp_path, input_size=16)


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="not a folder to write into"):
        vitzoo.export_onnx(Tiny(), tmp_path / "file" / "t.onnx", input_size=16)


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere: the system's refusal is put on
        monkeypatch.setattr(tempfile, "mkdtemp", _refuse)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\); choose another"):
            vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", input_size=16)
    finally:
        tmp_path.chmod(0o700)


def _refuse(**kwargs: object) -> str:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a))
    with pytest.raises(
        ImportError, match=rf"needs {package}, not installed here: pip install 'vitzoo\[onnx\]'"
    ):
        vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", input_size=16)
    assert list(tmp_path.iterdir()) == []


def test_export_package_alone_loads_no_onnx() -> None:
    import subprocess

    code = (
        "import sys, timm; a = set(sys.modules); import vitzoo.export; "
        "print({m.split('.')[0] for m in set(sys.modules) - a} & {'onnx', 'onnxscript', 'onnxruntime'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"opset": 17}, "opset 17 is not one of 18 to 23"),
        ({"input_size": (3, 2, 2, 2)}, r"input_size \(3, 2, 2, 2\) is not a side"),
        ({"input_size": 0}, r"input_size \(3, 0, 0\) is not positive"),
    ],
    ids=["opset", "four sizes", "zero"],
)
def test_bad_arguments(kwargs: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        vitzoo.export_onnx(Tiny(), tmp_path / "t.onnx", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_models_without_float32_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, export takes float32"):
        vitzoo.export_onnx(Tiny().bfloat16(), tmp_path / "t.onnx", input_size=16)
    with pytest.raises(ValueError, match="meta device and has no weights"):
        vitzoo.export_onnx(Tiny().to("meta"), tmp_path / "t.onnx", input_size=16)


def test_a_tie_is_tried_on_other_images_a_wrong_graph_stays_refused(tiny: Path) -> None:
    model = Tiny().eval()

    def make_input(batch: int, seed: int) -> torch.Tensor:
        return image((batch, 3, 16, 16), seed)

    def flips_on_the_first(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(x) * (1.01 if torch.equal(x, make_input(len(x), 0)) else 1.0)]

    run = functools.partial(check.run_session, check.open_session(tiny))
    once = check.largest_difference(run, flips_on_the_first, make_input, (1, 3), 1e-4)
    thrice = check.largest_difference(run, flips_on_the_first, make_input, (1, 3), 1e-4, draws=3)
    always = check.largest_difference(
        run, lambda x: [o * 2 for o in flips_on_the_first(x)], make_input, (1,), 1e-4, 3
    )
    assert once == pytest.approx(0.01 / 1.01, rel=1e-2)
    assert thrice <= 1e-4
    assert always == pytest.approx(0.5, rel=2e-2)
