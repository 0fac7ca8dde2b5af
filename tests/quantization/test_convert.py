"""Models converted to integer layers give the simulation's numbers, keep their state, and say what stays in float."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.deploy import torch_coverage
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.quantization.convert import convert_int8, simulate_int8
from vitzoo.quantization.graph import Site, get_tensor
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.modules import Int8Linear
from vitzoo.testing import image, relative_difference

SIZE = 64
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((5, 3, SIZE, SIZE), 9)
RECIPES = {
    "static": Recipe("static"),
    "dynamic": Recipe("dynamic", activations="dynamic"),
    "smooth": Recipe("smooth", smooth=0.5),
    "reparam": Recipe("reparam", norm="channel", fit="percentile"),
    "products": Recipe("products", products=True),
    "reduced": Recipe("reduced", reduce_range=True),
    "rounded": Recipe("rounded", bias_correction=True, rounding="least_squares"),
}


class Mixed(nn.Module):
    """A convolution, attention without biases, both activations, a layer called twice and one used as a function."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.norm_of_stem = nn.BatchNorm2d(32)
        self.block = timm.models.vision_transformer.Block(32, 2, qkv_bias=False)
        self.twice = nn.Linear(32, 32)
        self.rectified = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
        self.matrix = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_of_stem(self.stem(x))
        x = self.block(x.flatten(2).transpose(1, 2))  # (B, 64, 32)
        x = x + self.twice(self.twice(x))
        x = x + self.rectified(x)
        x = nn.functional.linear(x, self.matrix)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture(scope="module")
def made(model: nn.Module) -> dict[str, QuantizedModel]:
    return {name: quantize(model, recipe, BATCHES) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_converted_model_is_the_simulation(
    model: nn.Module, made: dict[str, QuantizedModel], name: str
) -> None:
    converted = convert_int8(model, made[name])
    with torch.no_grad():
        exact, out, expected = model(HELD_BACK), converted(HELD_BACK), simulate_int8(made[name])(HELD_BACK)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    # a value that another spelling of attention moves across a tie changes what follows it
    assert relative_difference(out, expected) < cost
    linear = {site.name for site in made[name].sites if site.kind == "linear"}
    assert {layer.name for layer in converted.layers if layer.mode != "float"} == linear
    assert {*converted.int8_layers} == linear
    assert len([m for m in converted.modules() if isinstance(m, Int8Linear)]) == len(linear) == 10


class Single(nn.Module):
    """Layers whose inputs are the simulation's to the last bit."""

    num_classes = 12

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(SIZE, 24), nn.Linear(24, 12, bias=False)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize("recipe", ["static", "dynamic"])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.GELU(), nn.GELU("tanh")], ids=str)
def test_equal_inputs_give_equal_outputs(recipe: str, activation: nn.Module | None) -> None:
    model = Single(activation).eval()
    quantized = quantize(model, RECIPES[recipe], BATCHES)
    converted = convert_int8(model, quantized)
    with torch.no_grad():
        out, expected, exact = converted(HELD_BACK), simulate_int8(quantized)(HELD_BACK), model(HELD_BACK)
        hidden = model.activation(model.first(HELD_BACK))
    difference = (out - expected).abs()
    # all but the few values whose hidden codes fall on a tie, and those by one code
    step = hidden.abs().max() / 127 if recipe == "dynamic" else quantized.plans["last"].operands[0].scale
    assert difference.max() < 1.001 * step * model.last.weight.abs().max()
    assert (difference > 1e-5 * expected.abs().max()).float().mean() < 0.01
    assert relative_difference(out, exact) > 1e-3
    first = converted.body.get_submodule("first")
    absorbed = {"ReLU()": "relu", "GELU(approximate='none')": "gelu"}.get(str(activation))
    assert first.activation == absorbed
    joined = recipe == "static" and (activation is None or absorbed is not None)
    assert (first.out_scale is not None) == joined


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_the_state_is_saved_and_loaded(model: nn.Module, made: dict[str, QuantizedModel], name: str) -> None:
    converted = convert_int8(model, made[name])
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    other = Mixed().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    again = convert_int8(other, quantize(other, RECIPES[name], [x * 2 for x in BATCHES]))
    with torch.no_grad():
        assert relative_difference(again(HELD_BACK), converted(HELD_BACK)) > 0.1
        again.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(again(HELD_BACK), converted(HELD_BACK))
    held = {key: value.dtype for key, value in converted.state_dict().items()}
    assert held["body.block.attn.qkv.weight_int8"] == torch.int8
    assert not [key for key in held if key.endswith("qkv.weight")]
    integers = sum(dtype == torch.int8 for dtype in held.values())
    assert integers == 10


def test_the_same_bits_at_every_batch_and_number_of_threads(
    model: nn.Module, made: dict[str, QuantizedModel]
) -> None:
    converted = convert_int8(model, made["dynamic"])
    before = torch.get_num_threads()
    layer = converted.body.get_submodule("block.mlp.fc1")
    x = image((5, 64, 32))
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    with torch.no_grad():
        assert torch.equal(converted(HELD_BACK), converted(HELD_BACK))
        # a token's scale is its own: other images change nothing but the order of float sums
        together = converted(HELD_BACK)
        alone = torch.cat([converted(x) for x in HELD_BACK.split(1)])
    assert relative_difference(alone, together) < 0.02


def test_the_model_and_what_was_quantized_are_not_changed(
    model: nn.Module, made: dict[str, QuantizedModel]
) -> None:
    quantized = made["smooth"]
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(quantized.state_dict())
    converted = convert_int8(model, quantized)
    for tensor in converted.state_dict().values():
        tensor.zero_()
    for module, state in zip((model, quantized), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    converted.train().eval()
    quantized.train().eval()


def test_what_stays_in_float_is_named_and_counted(model: nn.Module, made: dict[str, QuantizedModel]) -> None:
    converted = convert_int8(model, made["products"])
    assert converted.floating["stem"].startswith("a convolution")
    assert converted.floating["block.attn.scores"].startswith("a product of two activations")
    assert len(converted.floating) == 3
    held = quantize(model, Recipe("held", skip=("block.mlp.*",)), BATCHES)
    partly = convert_int8(model, held)
    assert partly.floating["block.mlp.fc1"] == "the recipe left it in float"
    for module in (converted, partly):
        coverage = torch_coverage(module, module.input_size)
        macs = dict.fromkeys(("static", "dynamic", "float"), 0)
        for layer in module.layers:
            macs[layer.mode] += layer.macs
        assert coverage.total_macs == sum(macs.values())
        assert coverage.integer_macs == macs["static"]
        assert sum(coverage.floating.values()) == macs["float"]
        assert 0 < coverage.share < 1
    assert torch_coverage(model, converted.input_size).integer_macs == 0


def test_coverage_refuses_what_it_cannot_count() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x).Q

    with pytest.raises(ValueError, match=r"runs aten::linalg_qr.*, whose products cannot be counted"):
        torch_coverage(Unknown(), (3, 8, 8))


@pytest.mark.parametrize("name", ["w4a4", "w6a6", "fq", "twin"])
def test_recipes_that_are_simulated_only_are_refused(model: nn.Module, name: str) -> None:
    quantized = quantize(model, load_recipe(name), BATCHES)
    with pytest.raises(ValueError, match=f"recipe '{name}' can only be simulated"):
        convert_int8(model, quantized)


def test_another_model_is_refused(model: nn.Module, made: dict[str, QuantizedModel]) -> None:
    class Other(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5

    with pytest.raises(ValueError, match=r"not the one that was quantized: in float their logits differ"):
        convert_int8(Other().eval(), made["static"])
    with pytest.raises(ValueError, match=r"only one of them has block.attn.proj, block"):
        convert_int8(Single().eval(), made["static"])


# a shallow model of each family: attention fused, windowed, pooled and with scores, a scan
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "evit_tiny_patch16_224": (
        {"img_size": SIZE, "depth": 3, "drop_loc": (1,), "fuse_token": True},
        {"attention_with_scores", "reorganize_tokens"},
    ),
    "litv2_small": ({"depths": (1, 1, 1, 1)}, {"window_attention", "pooled_attention"}),
    "vim_tiny_patch16_224": ({"img_size": SIZE, "depth": 2}, {"bidirectional_selective_scan"}),
    "cvt_13": ({"depths": (1, 1, 1)}, set()),
    "convnext_atto": ({}, set()),
    "efficientvit_m0": ({}, set()),
}
LONG = ("litv2_small", "cvt_13", "convnext_atto", "efficientvit_m0")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in FAMILIES]
)
@pytest.mark.parametrize("recipe", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_each_layer_of_each_family_is_the_simulation(name: str, recipe: str) -> None:
    torch.manual_seed(0)
    kwargs, operators = FAMILIES[name]
    model = vitzoo.create_model(name, num_classes=10, **kwargs).eval()
    size = 224 if name.startswith("efficientvit") else SIZE
    x = image((2, 3, size, size), 0)
    quantized = quantize(model, RECIPES[recipe], [x])
    converted = convert_int8(model, quantized)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for key, layer in converted.int8_layers.items():
        layer.register_forward_hook(lambda _, args, out, key=key: seen.update({key: (*args, out)}))
    with torch.no_grad():
        exact, out, expected = model(x), converted(x), simulate_int8(quantized)(x)
    assert relative_difference(out, expected) < relative_difference(expected, exact)
    assert {*seen} == {layer.name for layer in converted.layers if layer.mode != "float"}
    for site in quantized.sites:
        if site.name in seen:
            _compare_with_plan(quantized, site, converted.int8_layers[site.name], *seen[site.name])
    targets = {str(node.target) for node in converted.body.graph.nodes}
    assert {t.split(".")[1] for t in targets if t.startswith("vitzoo.")} >= operators


def _compare_with_plan(
    quantized: QuantizedModel, site: Site, layer: Int8Linear, x: Tensor, out: Tensor
) -> None:
    """Hold a layer to its plan's quantizers on the inputs that it had."""
    plan = quantized.plans[site.name]
    if x.dtype == torch.uint8:
        x = plan.operands[0].dequantize(x.float())
    token = x.abs().amax(-1, keepdim=True) / 127
    x = (x / token).round() * token if plan.dynamic else plan.operands[0](x)
    weight = plan.weight(get_tensor(quantized.float_graph, site.weight))
    y = x.double() @ weight.double().t()
    y = y if layer.bias is None else y + layer.bias.double()
    y = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, None: nn.Identity()}[layer.activation](y)
    if layer.out_scale is not None:
        y = (y / layer.out_scale).round() + layer.out_zero_point
        difference = (out.double() - y.clamp(0, 255)).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3
        return
    assert relative_difference(out, y) < 1e-5
