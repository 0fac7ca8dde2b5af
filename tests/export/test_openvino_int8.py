"""OpenVINO runs our INT8 files with the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import vitzoo
from vitzoo.benchmark.machine import this_machine
from vitzoo.deploy import openvino_coverage
from vitzoo.export.check import open_session, run_session
from vitzoo.export.openvino import convert_onnx, open_openvino
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.testing import image, relative_difference

pytest.importorskip("openvino", reason="pip install 'vitzoo[openvino]'")


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", depth=1, num_classes=10, embed_dim=48, img_size=64
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def _in_openvino(
    model: torch.nn.Module, recipe: Recipe, x: torch.Tensor, folder: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the logits of the model, of its simulation, and of `int8.xml`, which is for AVX2 if its weights are."""
    quantized = quantize(model, recipe, [x])
    target = "x86-avx2" if recipe.reduce_range else "x86-vnni"
    write_quantized(quantized, folder / "int8.onnx", model, target)
    convert_onnx(folder / "int8.onnx", folder / "int8.xml")
    with torch.no_grad():
        exact, expected = model(x), quantized(x)
    (out,) = open_openvino(folder / "int8.xml", threads=1)(x)
    return exact, expected, out


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_an_integer_patch_embedding_is_the_simulation(tmp_path: Path, suffix: str) -> None:
    model = _model()
    x = image((2, 3, 64, 64), 0)
    recipe = Recipe("static", reduce_range=True)
    quantized = quantize(model, recipe, [x], filter_fn=lambda site: "patch_embed" in site.name)
    path = tmp_path / "int8.onnx"
    write_quantized(quantized, path, model, "x86-avx2")
    if suffix == ".xml":
        convert_onnx(path, tmp_path / "int8.xml")
    with torch.no_grad():
        exact, expected = model(x), quantized(x)
    (out,) = open_openvino(tmp_path / f"int8{suffix}", threads=1)(x)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    assert relative_difference(out, expected) < 0.1 * cost


@pytest.mark.slow
@pytest.mark.skipif(
    this_machine() != "x86-vnni", reason="OpenVINO has no integer products of activations here"
)
def test_attention_runs_in_integers_and_is_the_simulation(tmp_path: Path) -> None:
    model, x = _model(), image((2, 3, 64, 64), 0)
    exact, expected, out = _in_openvino(model, load_recipe("w8a8_openvino"), x, tmp_path)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    # fused attention rounds otherwise: a code that falls on a tie changes what follows it
    assert relative_difference(out, expected) < cost
    assert openvino_coverage(tmp_path / "int8.xml", x[:1]).floating == {}


@pytest.mark.skipif(
    this_machine() != "x86-vnni", reason="OpenVINO has no integer products of activations here"
)
@pytest.mark.parametrize("name", ["w8a8", "w8a8_openvino", "w7a8"])
def test_layers_behind_a_concatenation_run_in_integers(tmp_path: Path, name: str) -> None:
    # class token and patches: OpenVINO moves the quantizer to both, and then took no zero point
    torch.manual_seed(0)
    model = vitzoo.create_model(
        "cvt_13", img_size=32, embed_dims=(32, 64, 128), depths=(1, 1, 2), num_heads=(1, 2, 4), num_classes=10
    ).eval()
    x = image((2, 3, 32, 32), 0)
    recipe = Recipe(name, reduce_range=True) if name == "w7a8" else load_recipe(name)
    exact, expected, out = _in_openvino(model, recipe, x, tmp_path)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    (other,) = run_session(open_session(tmp_path / "int8.onnx", threads=1), x)
    assert relative_difference(out, other) < 0.1 * cost
    assert (openvino_coverage(tmp_path / "int8.xml", x[:1]).floating == {}) == recipe.products
