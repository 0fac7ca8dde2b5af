"""Relevance propagation against the authors' code, and its conservation on other models."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

import vitzoo
from vitzoo.quantization.relevance import contribution_scores, layer_relevance
from vitzoo.testing import assert_golden, golden_state_dict, image, load_golden


def _golden_model() -> tuple[nn.Module, dict]:
    golden = load_golden("quant/lrp_vit_rules")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=2, num_heads=3, qkv_bias=True
    )
    model.load_state_dict(golden_state_dict(golden))
    model.norm.eps = 1e-5
    return model.double().eval(), golden["cases"][0]


def test_relevance_of_every_layer_equals_the_authors() -> None:
    model, case = _golden_model()
    recorded = {
        tuple(m): value
        for key, value in case["outputs"].items()
        if (m := re.findall(r"^(.*): relevance at (input|output),", key)) and (m := m[0])
    }
    names = {name for name, _ in recorded}
    x, target = image(case["input"], case["seed"]).double(), torch.tensor([case["target_class"]])
    assert_golden(model(x), case["outputs"]["logits"], 1e-5)
    found = layer_relevance(model, x, names, target)
    assert len(recorded) == 18
    for (name, where), value in recorded.items():
        relevance = found[name][where == "output"]
        sums = torch.stack([relevance.sum(), relevance.abs().sum()])
        assert_golden(sums, value, 1e-6, f"{name} {where}")


def test_relevance_of_the_attention_maps_equals_the_authors() -> None:
    model, case = _golden_model()
    for block in model.blocks:
        block.attn.fused_attn = False
    x, target = image(case["input"], case["seed"]).double(), torch.tensor([case["target_class"]])
    names = ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    found = layer_relevance(model, x, names, target)
    for i in range(2):
        recorded = case["outputs"][f"blocks.{i}.attn: relevance of attention map (H,N,N)"]
        assert_golden(found[names[i]][0][0], recorded, 1e-6, names[i])


@pytest.mark.parametrize(
    ("name", "size"), [("deit_tiny_patch16_224", 224), ("litv2_small", 224), ("cvt_13", 224)]
)
def test_relevance_is_conserved(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name, num_classes=5).double().eval()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    x = image((1, 3, size, size)).double()
    found = layer_relevance(model, x, layers[-1:])
    assert float(found[layers[-1]][1].sum()) == pytest.approx(1)
    assert float(found[layers[-1]][0].sum()) == pytest.approx(1, rel=1e-6)
    scores = contribution_scores(model, [x], layers)
    assert sum(scores.values()) == pytest.approx(1)
    assert all(score > 0 for score in scores.values())


def test_operators_of_ours_carry_relevance_as_the_torch_operations_they_stand_for() -> None:
    # keeping every token, EViT is DeiT with its attention in one operator
    torch.manual_seed(0)
    options = dict(num_classes=5, img_size=32, depth=2)
    plain = timm.create_model("deit_tiny_patch16_224", **options).double().eval()
    ours = vitzoo.create_model("evit_tiny_patch16_224", base_keep_rate=0.99, drop_loc=(1,), **options)
    ours = ours.double().eval()
    ours.load_state_dict(plain.state_dict())
    layers = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
    x = image((2, 3, 32, 32)).double()
    expected, found = (layer_relevance(model, x, layers) for model in (plain, ours))
    for name in layers:
        # the operator's tokens come in falling order of their scores, which permutes what later layers see
        for ours_of, theirs in zip(found[name], expected[name], strict=True):
            sums = [torch.stack([r.sum(), r.abs().sum()]) for r in (ours_of, theirs)]
            torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-9)


class _Gated(nn.Module):
    """A convolution and a squeeze-and-excitation gate, with activations in place as timm's convolutional nets have."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.reduce, self.expand = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.inner, self.head = nn.ReLU(inplace), nn.Hardswish(inplace), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        gate = self.expand(self.inner(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))


def test_activations_in_place_carry_the_same_relevance() -> None:
    torch.manual_seed(0)
    plain, in_place = _Gated(inplace=False).double().eval(), _Gated(inplace=True).double().eval()
    in_place.load_state_dict(plain.state_dict())
    layers = ["first", "reduce", "expand", "head"]
    x = image((2, 3, 16, 16)).double()
    expected, found = (layer_relevance(model, x, layers) for model in (plain, in_place))
    for name in layers:
        for ours, wanted in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def test_an_unknown_layer_is_refused() -> None:
    model, _ = _golden_model()
    with pytest.raises(ValueError, match=r"no layer blocks\.9"):
        layer_relevance(model, image((1, 3, 32, 32)).double(), ["blocks.9"])
