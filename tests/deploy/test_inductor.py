"""Inductor runs a quantized model in integers, with the simulation's numbers; needs torchao and a C++ compiler."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.deploy import inductor, lower_int8
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.model import QuantizedModel
from vitzoo.testing import image, relative_difference

SIZE = 64
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((4, 3, SIZE, SIZE), 9)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed: pip install 'vitzoo[inductor]'",
)


class Mixed(nn.Module):
    """Dense and depthwise convolutions, attention, linear layers of tokens and of one vector."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.block = timm.models.vision_transformer.Block(32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pointwise(x + self.depthwise(x))
        x = self.block(x.flatten(2).transpose(1, 2))  # (B, 256, 32)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Mixed().eval()


def _quantized(model: nn.Module, activations: str) -> QuantizedModel:
    recipe = Recipe(activations, activations=activations)
    if vitzoo.deploy.this_machine() == "x86-avx2":
        recipe = dataclasses.replace(recipe, reduce_range=True)
    return quantize(model, recipe, BATCHES)


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_every_layer_runs_in_integers_and_gives_the_simulations_numbers(
    model: nn.Module, activations: str
) -> None:
    quantized = _quantized(model, activations)
    lowered = lower_int8(model, quantized, batch_size=4)
    with torch.no_grad():
        exact, expected = model(HELD_BACK), quantized(HELD_BACK)
    out = lowered(HELD_BACK)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    assert relative_difference(out, expected) < cost / 2
    # stem, depthwise, pointwise, the head, and by image 256 tokens of qkv, proj and the two of the MLP; attention's two
    # products stay in float
    integer = 256 * (32 * 48 + 32 * 9 + 32 * 32) + 32 * 10 + 256 * 12 * 32 * 32
    floating = 2 * 256 * 256 * 32
    assert lowered.integer_products == 8
    assert lowered.coverage.integer_macs == integer
    assert lowered.coverage.total_macs == integer + floating
    assert lowered.num_classes == 10
    assert lowered.input_size == (3, SIZE, SIZE)


@needs_torchao
@pytest.mark.slow
def test_a_deformable_convolution_stays_in_float_and_is_counted() -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(
        "litv2_small",
        img_size=SIZE,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 4),
        num_classes=10,
    ).eval()
    quantized = _quantized(model, "static")
    lowered = lower_int8(model, quantized, batch_size=4)
    assert lowered.coverage.floating["torchvision.deform_conv2d.default"] > 0
    assert lowered.integer_products == sum(site.kind != "product" for site in quantized.sites)
    with torch.no_grad():
        exact, expected = model(HELD_BACK), quantized(HELD_BACK)
    assert relative_difference(lowered(HELD_BACK), expected) < relative_difference(expected, exact)


def test_nodes_without_a_shape_have_no_products() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    assert "val" not in node.meta
    assert inductor._macs(node) == 0


@needs_torchao
@pytest.mark.slow
def test_a_layer_left_in_float_is_an_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = _quantized(model, "static")
    monkeypatch.setattr(inductor, "pt2e_graph", lambda model, quantized: model)
    with pytest.raises(RuntimeError, match="Inductor runs 0 of 8 quantized layers in integers; in float: "):
        lower_int8(model, quantized, batch_size=2)


def test_a_missing_package_is_named_with_what_installs_it(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = _quantized(model, "static")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(
        ImportError, match=r"needs torchao, not installed here: pip install 'vitzoo\[inductor\]'"
    ):
        lower_int8(model, quantized)


@pytest.mark.parametrize(
    ("machine", "message"),
    [("arm", "this machine is arm"), ("x86-avx2", "would saturate sums of full-range u8 x s8 products")],
)
def test_machines_that_would_be_slow_or_wrong_are_refused(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, machine: str, message: str
) -> None:
    monkeypatch.setattr(inductor, "register_passes", lambda: None)
    monkeypatch.setattr(inductor, "this_machine", lambda: machine)
    with pytest.raises(ValueError, match=message):
        lower_int8(model, quantize(model, Recipe("full"), BATCHES))
