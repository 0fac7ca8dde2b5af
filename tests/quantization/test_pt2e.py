"""Graphs of PT2E's operators carry the scales of the quantized model and give the simulation's numbers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.pt2e import pt2e_graph
from vitzoo.testing import image, relative_difference

SIZE = 64
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((5, 3, SIZE, SIZE), 9)
RECIPES = {
    "static": Recipe("static"),
    "dynamic": Recipe("dynamic", activations="dynamic"),
    "reduced": Recipe("reduced", reduce_range=True),
    "rounded": Recipe("rounded", bias_correction=True, rounding="least_squares"),
}
decomposed = torch.ops.quantized_decomposed


class Mixed(nn.Module):
    """Convolutions in a row with and without ReLU, one read twice, attention, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.block = timm.models.vision_transformer.Block(32, 2, qkv_bias=False)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pointwise(x + self.depthwise(x))
        x = self.block(x.flatten(2).transpose(1, 2))  # (B, 256, 32)
        x = x + self.twice(self.twice(x))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture(scope="module")
def made(model: nn.Module) -> dict[str, QuantizedModel]:
    return {name: quantize(model, recipe, BATCHES) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_graph_is_the_simulation(model: nn.Module, made: dict[str, QuantizedModel], name: str) -> None:
    graph = pt2e_graph(model, made[name])
    with torch.no_grad():
        exact, out, expected = model(HELD_BACK), graph(HELD_BACK), made[name](HELD_BACK)
    cost = relative_difference(expected, exact)
    assert 1e-3 < cost < 0.1
    # a value that another spelling of attention moves across a tie changes what follows it
    assert relative_difference(out, expected) < cost


@pytest.mark.parametrize("name", RECIPES)
def test_convolutions_are_the_simulation_to_rounding(name: str) -> None:
    model = Mixed().eval()
    model.block, model.twice = nn.Identity(), nn.Identity()
    quantized = quantize(model, RECIPES[name], BATCHES)
    with torch.no_grad():
        out, expected = pt2e_graph(model, quantized)(HELD_BACK), quantized(HELD_BACK)
    assert relative_difference(out, expected) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_the_graph_carries_our_codes_and_scales(
    model: nn.Module, made: dict[str, QuantizedModel], name: str
) -> None:
    quantized = made[name]
    graph = pt2e_graph(model, quantized)
    weights = [n for n in graph.graph.nodes if n.target is decomposed.dequantize_per_channel.default]
    plans = [quantized.plans[site.name] for site in quantized.sites if site.name in quantized.plans]
    assert len(weights) == len(plans) == 10
    for node, plan in zip(weights, plans, strict=True):
        codes, scale = (getattr(graph, str(argument.target)) for argument in node.args[:2])
        assert codes.dtype == torch.int8
        assert plan.weight is not None
        torch.testing.assert_close(scale, plan.weight.scale.flatten(), rtol=0, atol=0)
    static = [n for n in graph.graph.nodes if n.target is decomposed.quantize_per_tensor.default]
    wanted = {
        (float(q.scale), int(q.zero_point))
        for plan in plans
        if not plan.dynamic
        for q in (plan.operands[0], plan.output)
        if q is not None
    }
    assert {node.args[1:3] for node in static} == wanted
    # a node that two layers read by one scale is quantized once
    keys = [(node.args[0].name, *node.args[1:3]) for node in static]
    assert len(keys) == len(set(keys))


def test_simulated_recipes_and_other_models_are_refused(
    model: nn.Module, made: dict[str, QuantizedModel]
) -> None:
    with pytest.raises(ValueError, match="recipe 'w4a4' can only be simulated"):
        pt2e_graph(model, quantize(model, load_recipe("w4a4"), BATCHES))
    other = Mixed().eval()
    nn.init.normal_(other.head.weight)
    with torch.no_grad():
        other.stem[0].weight.mul_(2)
    with pytest.raises(ValueError, match="the model is not the one that was quantized"):
        pt2e_graph(nn.Sequential(other, nn.Linear(10, 3)).eval(), made["static"])
