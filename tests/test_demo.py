"""The demo's figures are the model's, its page stands alone, and what fails is said."""

import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitzoo

pytest.importorskip("onnxruntime", reason="needs the demo's packages: pip install 'vitzoo[demo]'")
pytest.importorskip("sklearn", reason="needs the demo's packages: pip install 'vitzoo[demo]'")
pytest.importorskip("jinja2", reason="needs the demo's packages: pip install 'vitzoo[demo]'")

from rich.console import Console

from vitzoo.demo import MODELS, UNTRAINED, DemoError, int8, measure, pictures, run
from vitzoo.deploy import Thresholds
from vitzoo.export import ExportError
from vitzoo.export.check import open_session, run_session

NAMES = ["mobilenetv3_small_050", "evit_tiny_patch16_224"]


class Page(HTMLParser):
    """Collects what a page refers to and what its pictures say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: list[str | None] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [found[k] or "" for k in ("src", "href", "srcset", "data") if k in found]
        if tag == "img":
            self.alts.append(found.get("alt"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    out = tmp_path_factory.mktemp("demo") / "results"
    text = io.StringIO()
    run(out, models=NAMES, seconds=0.05, console=Console(file=text, width=80))
    return json.loads((out / "demo.json").read_text()), out, text.getvalue()


def test_one_model_of_each_category() -> None:
    assert set(MODELS) == set(vitzoo.CATEGORIES)
    for category, name in MODELS.items():
        assert name in vitzoo.list_models(category=category)


def test_figures_are_those_of_the_model(done: tuple[dict[str, Any], Path, str]) -> None:
    result = done[0]
    assert [row["model"] for row in result["models"]] == NAMES
    for row in result["models"]:
        model = timm.create_model(row["model"])
        assert row["params"] == sum(p.numel() for p in model.parameters())
        counted = vitzoo.count_flops(model, row["input_size"])
        assert row["gmacs"] == pytest.approx(counted.gmacs, abs=1e-4)
        assert row["gflops"] == pytest.approx(2 * row["gmacs"], abs=2e-4)
        assert row["uncounted_ops"] == []
        assert row["weights"] == "untrained (seed 0)"
        assert 0 < row["latency_ms"]["median"] < 60_000
        assert row["latency_ms"]["iqr"] >= 0
        assert row["images_per_second"] > 0
        onnx = row["onnx"]
        assert 0 <= onnx["photo_relative_difference"] < 1e-4
        assert onnx["max_relative_difference"] < 1e-4
        assert onnx["size_bytes"] > 4 * row["params"]
        assert onnx["latency_ms"]["median"] > 0
    kept = result["models"][1]["kept_patches"]
    assert kept == {"china.jpg": [138, 97, 68], "flower.jpg": [138, 97, 68]}
    assert result["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["machine"]["cpu"]["threads"] == torch.get_num_threads()
    assert result["operators"]["selective_scan"]["reference"] is None


def test_folder_holds_the_two_files_only(done: tuple[dict[str, Any], Path, str]) -> None:
    assert sorted(p.name for p in done[1].iterdir()) == ["demo.html", "demo.json"]


def test_page_stands_alone(done: tuple[dict[str, Any], Path, str]) -> None:
    text = (done[1] / "demo.html").read_text()
    page = Page(text)
    assert len(page.links) == len(page.alts) == 2 + 2 * 4  # photographs, and EViT's four pictures of each
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert all(page.alts)
    assert not re.search(r"https?://|@import|url\(", text)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "196 patches are faded, dropped by block 9" in text
    for row in done[0]["models"]:
        assert row["model"] in text
        assert f"{row['params'] / 1e6:.2f}" in text
    assert UNTRAINED[1:] in text


def test_terminal_shows_table_and_warning(done: tuple[dict[str, Any], Path, str]) -> None:
    text = done[2]
    assert max(map(len, text.splitlines())) <= 80
    for row in done[0]["models"]:
        assert row["model"] in text
        assert f"{row['latency_ms']['median']:.1f}" in text
    assert UNTRAINED in " ".join(text.split())
    assert "100%" in text


@pytest.mark.parametrize(
    ("speed", "suffix"),
    [(0.0, "_int8.onnx"), pytest.param(1e6, "_int8.float.onnx", marks=pytest.mark.slow)],
)
def test_ends_in_an_int8_file_or_says_why_not(
    speed: float, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "THRESHOLDS", Thresholds(coverage=0.5, speed=speed))
    text = io.StringIO()
    run(tmp_path, models=NAMES[:1], seconds=0.01, int8=True, console=Console(file=text, width=80))
    found = json.loads((tmp_path / "demo.json").read_text())["models"][0]["int8"]
    assert found["file"] == f"{NAMES[0]}{suffix}"
    assert found["size_bytes"] == (tmp_path / found["file"]).stat().st_size
    assert 0.5 < found["coverage"] <= 1
    assert 0 < found["logit_error"] < 1
    assert not found["products"]
    assert (found["refused"] is None) == (speed == 0)
    assert f"{found['coverage']:.3f}" in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80
    page = (tmp_path / "demo.html").read_text()
    assert found["file"] in page
    assert ("refused: speed is" in page) == (speed > 0)
    session = open_session(tmp_path / found["file"])
    assert run_session(session, torch.zeros(3, 3, 224, 224))[0].shape == (3, 1000)


@pytest.mark.slow
def test_products_are_quantized_where_they_alone_would_miss_the_gate(tmp_path: Path) -> None:
    text = io.StringIO()
    run(tmp_path, models=NAMES[1:], seconds=0.01, int8=True, console=Console(file=text, width=80))
    found = json.loads((tmp_path / "demo.json").read_text())["models"][0]["int8"]
    assert found["products"]
    assert found["coverage"] > int8.THRESHOLDS.coverage
    assert "attention's products too" in text.getvalue()
    assert "attention's products too" in (tmp_path / "demo.html").read_text()


def test_crops_are_normalized_and_the_same_each_time() -> None:
    model = timm.create_model(NAMES[0])
    photos = [*measure.photographs().values()]
    crops = int8.crops(model, photos, 5)
    assert crops.shape == (5, 3, 224, 224)
    assert torch.equal(crops, int8.crops(model, photos, 5))
    assert not torch.equal(crops[0], crops[2])  # of one photograph
    assert crops.abs().max() < 3


def test_pictures_show_what_was_kept() -> None:
    seen = pictures.np.full((8, 8, 3), 0.2)
    mask = pictures.np.array([[True, False], [False, False]])
    out = pictures._faded(seen, mask)
    assert out[1:4, 1:4] == pytest.approx(0.2)
    assert out[5:, 5:] == pytest.approx(0.2 * 0.18 + 0.72)


def test_hilo_maps_are_the_branches_of_the_block() -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model("litv2_small").eval()
    x = torch.randn(1, 3, 64, 64)
    figure_layer = model.layers[2].blocks[3].attn
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        seen.append(out.unflatten(1, args[1]))

    handle = figure_layer.register_forward_hook(keep)
    maps = pictures._branch_maps(model, figure_layer, x)
    handle.remove()
    both = seen[0] - seen[0].mean((1, 2), keepdim=True)
    high, low = both.split([figure_layer.h_dim, figure_layer.l_dim], dim=-1)
    assert torch.allclose(maps[0], high.norm(dim=-1)[0], rtol=1e-5)
    assert torch.allclose(maps[1], low.norm(dim=-1)[0], rtol=1e-5)
    assert not figure_layer._forward_pre_hooks


def test_a_failure_is_named_and_the_rest_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(subject: measure.Subject, *args: object, **kwargs: object) -> None:
        raise ExportError("no such luck")

    monkeypatch.setattr(measure, "_export", refuse)
    with pytest.raises(DemoError, match=r"mobilenetv3_small_050: ExportError: no such luck"):
        run(tmp_path, models=NAMES[:1], seconds=0.01, console=Console(file=io.StringIO()))
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["models"][0]["latency_ms"]["median"] > 0
    assert "no such luck" in (tmp_path / "demo.html").read_text()


def test_weights_that_cannot_be_had_are_said() -> None:
    model, said = measure._with_weights("evit_small_patch16_224", pretrained=True)
    assert said.startswith("untrained (seed 0); the weights of evit_small_patch16_224")
    torch.manual_seed(0)
    assert torch.equal(model.head.weight, vitzoo.create_model("evit_small_patch16_224").head.weight)


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(vitzoo.UnknownModelError, match="cvt_13"):
        run(tmp_path / "new", models=["cvt_31"], console=Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file"):
        run(tmp_path / "file", models=NAMES[:1])
    with pytest.raises(NotADirectoryError, match="file"):
        run(tmp_path / "file" / "results", models=NAMES[:1])


@pytest.mark.parametrize("module", ["jinja2", "sklearn", "onnxruntime"])
def test_missing_package(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else find(n, *a))
    package = {"sklearn": "scikit-learn"}.get(module, module)
    with pytest.raises(ImportError, match=rf"the demo needs {package}.*pip install 'vitzoo\[demo\]'"):
        run(tmp_path, models=NAMES[:1])
    assert list(tmp_path.iterdir()) == []
