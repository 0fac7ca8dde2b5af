"""Quantizing whole models by recipe: what changes, what stays, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitzoo
from vitzoo.quantization.allocation import allocate
from vitzoo.quantization.api import quantize, sensitivity
from vitzoo.quantization.calibration import fit_percentile
from vitzoo.quantization.captured import Captured
from vitzoo.quantization.config import Recipe, load_recipe, recipe_from_toml
from vitzoo.quantization.graph import capture, find_sites, norm_groups
from vitzoo.testing import image, relative_difference

SIZE = 64
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((3, 3, SIZE, SIZE), 9)


def _tiny(name: str = "evit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model(name, num_classes=10, img_size=SIZE, **kwargs).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return _tiny("deit_tiny_patch16_224", depth=2)


def _error(model: nn.Module, quantized: nn.Module) -> float:
    with torch.no_grad():
        return relative_difference(quantized(HELD_BACK), model(HELD_BACK))


# The weights are random: eight bits cost such a network more than a trained one.
RECIPES = {
    "w8a8": (Recipe("w8a8"), 0.05),
    "minmax": (Recipe("minmax", fit="minmax"), 0.05),
    "dynamic": (Recipe("dynamic", activations="dynamic"), 0.05),
    "smooth": (Recipe("smooth", smooth=0.5), 0.05),
    "reparam": (Recipe("reparam", norm="channel", fit="percentile"), 0.12),
    "accurate": (load_recipe("w8a8_accurate"), 0.05),
    "openvino": (load_recipe("w8a8_openvino"), 0.05),
    "products": (Recipe("products", products=True), 0.05),
    "fq": (Recipe("fq", norm="power_of_two", softmax="log2", products=True, fit="minmax"), 0.2),
    "w6a6": (Recipe("w6a6", weight_bits=6, activation_bits=6, fit="percentile", norm="channel"), 0.2),
}


@pytest.mark.parametrize(("recipe", "bound"), RECIPES.values(), ids=RECIPES)
def test_each_recipe_is_near_and_not_equal(model: nn.Module, recipe: Recipe, bound: float) -> None:
    quantized = quantize(model, recipe, BATCHES)
    error = _error(model, quantized)
    assert 1e-4 < error < bound
    assert quantized.quantized_macs > (0.99 if recipe.products else 0.8)
    assert quantized.logit_error < bound


def test_static_recipes_are_auto_with_every_layer_static() -> None:
    accurate, openvino, auto = (load_recipe(name) for name in ("w8a8_accurate", "w8a8_openvino", "auto"))
    named = {"name": accurate.name, "description": accurate.description}
    assert accurate == dataclasses.replace(auto, **named, activations="static", error_budget=None)
    named = {"name": openvino.name, "description": openvino.description}
    assert openvino == dataclasses.replace(accurate, **named, products=True, conv_codes=False)


def test_products_have_their_zero_points_in_the_middle_or_at_the_end(model: nn.Module) -> None:
    quantized = quantize(model, RECIPES["products"][0], BATCHES)
    found = {
        layer: [int(quantizer.zero_point) for quantizer in plan.operands]
        for layer, plan in quantized.plans.items()
        if plan.weight is None
    }
    assert found == {
        f"blocks.{i}.attn.{kind}": [q, 128] for i in range(2) for kind, q in (("scores", 128), ("mix", 0))
    }


def test_convolutions_that_write_floats_cost_less_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(3136, 9)
    )
    codes, floats = (quantize(net, Recipe("r", conv_codes=value), BATCHES) for value in (True, False))
    assert [plan.output is None for plan in codes.plans.values()] == [False, False, True]
    assert [plan.output is None for plan in floats.plans.values()] == [True, True, True]
    assert floats.logit_error < codes.logit_error


def test_twin_search_beats_the_extremes_at_four_bits(model: nn.Module) -> None:
    twin = Recipe(
        "t", weight_bits=4, activation_bits=4, fit="search", softmax="twin", gelu="twin", products=True
    )
    plain = Recipe("p", weight_bits=4, activation_bits=4, fit="minmax", products=True)
    assert _error(model, quantize(model, twin, BATCHES)) < _error(model, quantize(model, plain, BATCHES))


def test_moving_scales_keeps_the_function(model: nn.Module) -> None:
    for recipe in (RECIPES["smooth"][0], RECIPES["reparam"][0]):
        quantized = quantize(model, recipe, BATCHES)
        with torch.no_grad():
            assert relative_difference(quantized.float_graph(HELD_BACK), model(HELD_BACK)) < 1e-4
        norm = model.get_parameter("blocks.0.norm1.weight")
        assert not torch.allclose(quantized.float_graph.get_parameter("blocks.0.norm1.weight"), norm)


def test_an_error_budget_leaves_layers_in_floating_point(model: nn.Module) -> None:
    free = quantize(model, Recipe("w8a8"), BATCHES)
    budget = free.logit_error * 0.7
    held = quantize(model, Recipe("w8a8", error_budget=budget), BATCHES)
    assert held.logit_error <= budget
    assert 0 < held.quantized_macs < free.quantized_macs
    assert {layer.mode for layer in held.layers} == {"static", "float"}
    assert any(layer.logit_error is not None for layer in held.layers)


def test_what_harms_most_for_its_products_leaves_first(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fc1 harms more than proj, which has a quarter of its products; both exceed the budget, either alone does not
    alone = {"blocks.0.mlp.fc1": 0.02, "blocks.0.attn.proj": 0.015}
    monkeypatch.setattr(
        Captured, "error", lambda _, plans: sum(alone.get(name, 0.0) ** 2 for name in plans) ** 0.5
    )
    monkeypatch.setattr(
        Captured, "errors", lambda _, plans, images: {name: alone.get(name, 0.0) for name in plans}
    )
    held = quantize(model, Recipe("w8a8", error_budget=0.021), BATCHES)
    assert [layer.name for layer in held.layers if layer.mode == "float" and layer.kind != "product"] == [
        "blocks.0.attn.proj"
    ]


def test_mixed_widths_hold_the_budget_and_beat_one_width(model: nn.Module) -> None:
    common = dict(weight_bits=4, activation_bits=4, fit="minmax")
    mixed = quantize(model, Recipe("m", mixed_bits=(3, 4, 5, 6), average_bits=4, **common), BATCHES)
    bits = {layer.name: layer.bits for layer in mixed.layers if layer.bits}
    sizes = {site.name: model.get_parameter(site.weight).numel() for site in mixed.sites if site.weight}
    inner = [name for name in bits if name not in ("patch_embed.proj", "head")]
    assert bits["patch_embed.proj"] == bits["head"] == 8
    assert len({bits[name] for name in inner}) > 1
    assert sum(bits[n] * sizes[n] for n in inner) <= 4 * sum(sizes[n] for n in inner)


def test_allocation_is_exact() -> None:
    errors = {
        "a": {2: 9.0, 3: 4.0, 4: 1.0},
        "b": {2: 5.0, 3: 4.5, 4: 0.5},
        "c": {2: 3.0, 3: 2.9, 4: 2.8},
        "d": {2: 8.0, 3: 1.0, 4: 0.9},
    }
    sizes = {"a": 6, "b": 4, "c": 10, "d": 2}
    for average in (2.0, 2.4, 3.0, 3.5, 4.0):
        found = allocate(errors, sizes, (2, 3, 4), average)
        allowed = [
            choice
            for choice in itertools.product((2, 3, 4), repeat=4)
            if sum(w * s for w, s in zip(choice, sizes.values(), strict=True)) <= average * 22
        ]
        best = min(sum(errors[n][w] for n, w in zip(errors, c, strict=True)) for c in allowed)
        assert sum(errors[n][w] for n, w in found.items()) == pytest.approx(best)
    with pytest.raises(ValueError, match=r"average is 1.5 bits, below the least of \[2, 3, 4\]"):
        allocate(errors, sizes, (2, 3, 4), 1.5)


@pytest.mark.parametrize("name", ["evit_tiny_patch16_224", "cvt_13", "litv2_small", "efficientvit_m0"])
def test_the_graph_is_the_model_and_its_sites_hold_its_macs(name: str) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name, num_classes=10).eval()
    size = model.pretrained_cfg["input_size"]
    x = image((3, *size))
    graph = capture(model, x[:2])
    sites = find_sites(graph)
    with torch.no_grad():
        assert relative_difference(graph(x), model(x)) < 1e-5
    # what is left stands before a linear layer or within a deformable convolution's autocast
    left = sum("batch_norm" in str(node.target) for node in graph.graph.nodes)
    assert left == {"litv2_small": 3, "efficientvit_m0": 1}.get(name, 0)
    counted = vitzoo.count_flops(model, input_size=size)
    kinds = ("matmul", "attention", "conv")
    assert sum(site.macs for site in sites) / 1e9 == pytest.approx(
        sum(counted.by_kind.get(kind, 0) for kind in kinds), rel=0.01
    )
    assert len({site.name for site in sites}) == len(sites)
    if name.startswith("evit"):
        assert len(norm_groups(graph, sites)) == 24


def test_the_model_itself_is_not_changed(model: nn.Module) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantize(model, RECIPES["reparam"][0], BATCHES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_filter_and_patterns_choose_layers(model: nn.Module) -> None:
    only = quantize(model, Recipe("w8a8", skip=("*.attn.*",)), BATCHES, lambda site: site.kind == "linear")
    assert set(only.plans) == {*(f"blocks.{i}.mlp.fc{k}" for i in range(2) for k in (1, 2)), "head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 1}, "bits is 1, expected 2 to 16"),
        ({"fit": "magic"}, "fit is 'magic', expected one of minmax"),
        ({"smooth": 2.0}, "smooth is 2.0, expected 0 to 1"),
        ({"error_budget": -1.0}, "error_budget is -1.0"),
        ({"mixed_bits": (3, 4)}, "go together"),
        ({"mixed_bits": (4, 5), "average_bits": 3.0}, "average_bits is 3.0, below the least"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe("bad", **changes)


def test_refused_calibration(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no calibration images"):
        quantize(model, Recipe("w8a8"), [])
    with pytest.raises(ValueError, match="several sizes"):
        quantize(model, Recipe("w8a8"), [BATCHES[0], BATCHES[0][..., :32]])
    with pytest.raises(ValueError, match="finds nothing to quantize"):
        quantize(model, Recipe("w8a8", skip=("*",)), BATCHES)


def test_recipes_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('weight_bits = 6\nskip = ["head"]\n')
    assert recipe_from_toml(path) == Recipe("mine", weight_bits=6, skip=("head",))
    path.write_text("wieght_bits = 6\n")
    with pytest.raises(ValueError, match="unknown keys wieght_bits"):
        recipe_from_toml(path)


class Writes(nn.Module):
    """Writes into its tensors, through views too, as timm's models do here and there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.conv = nn.Conv2d(3, 16, 8, stride=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.conv(x)).flatten(2).transpose(1, 2)  # (B, 64, 16)
        for layer in self.layers:
            y = layer(x)
            x = x.clone().add_(y)
            x[:, :2].mul_(0.5)
        return x.mean(1)


@pytest.mark.parametrize("which", ["transformer", "writes"])
def test_a_layers_sensitivity_is_the_error_of_quantizing_it_alone(model: nn.Module, which: str) -> None:
    net = model if which == "transformer" else Writes().eval()
    reports = sensitivity(net, Recipe("w8a8"), BATCHES, images=6)
    measured = [r for r in reports if r.logit_error is not None]
    assert len(measured) == sum(r.bits is not None for r in reports) > 3
    exact_images = torch.cat(BATCHES)[:6]
    for report in measured[:: max(1, len(measured) // 4)]:
        alone = quantize(net, Recipe("w8a8"), BATCHES, lambda site, name=report.name: site.name == name)
        with torch.no_grad():
            expected = relative_difference(alone(exact_images), net(exact_images))
        assert report.logit_error == pytest.approx(expected, rel=1e-3)
        assert report.sqnr_db > 20
    total = sum(r.logit_error**2 for r in measured) ** 0.5
    assert total == pytest.approx(quantize(net, Recipe("w8a8"), BATCHES).logit_error, rel=0.4)


def test_the_noise_of_a_layer_and_its_relu_is_that_of_both() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (SIZE - 2) ** 2, 5)).eval()
    first = sensitivity(net, Recipe("w8a8"), BATCHES)[0]
    assert first.sqnr_db > 30  # half the outputs are negative; against them it would be near 0


@pytest.mark.parametrize("constant", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_channel_of_equal_values_is_kept(constant: float, bits: int) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    weight[1] = constant  # a pruned filter, or a bias in disguise
    torch.testing.assert_close(fit_percentile(weight, bits, 0)(weight)[1], weight[1], rtol=1e-6, atol=1e-12)
    assert relative_difference(fit_percentile(weight, bits, 0)(weight), weight) < 0.1
