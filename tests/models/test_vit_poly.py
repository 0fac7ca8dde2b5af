from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vitzoo
from vitzoo.models.vit_poly import PolyViT
from vitzoo.testing import (
    assert_golden,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

GOLDEN = load_golden("polyphase/vit_small_patch16_224_poly")


def _case_id(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["input"])) + ("-roll" if "roll" in case else "")


CASES = [pytest.param(c, id=_case_id(c)) for c in GOLDEN["cases"]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vit") / "w.pth"
    torch.save({"model": golden_state_dict(GOLDEN)}, path)
    return str(path)


@pytest.fixture(scope="module")
def model(weights: str) -> PolyViT:
    return vitzoo.create_model(
        "vit_small_patch16_224_poly", pretrained=True, pretrained_cfg_overlay={"file": weights}
    ).eval()


def _input(case: dict[str, Any]) -> torch.Tensor:
    return image(case["input"], case["seed"]).roll(tuple(case.get("roll", (0, 0))), (2, 3))


def _small(**kwargs: Any) -> PolyViT:
    torch.manual_seed(0)
    return PolyViT(**{**dict(embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=64), **kwargs})


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_anchors_are_the_authors(weights: str, case: dict[str, Any]) -> None:
    model = vitzoo.create_model(
        "vit_small_patch16_224_poly",
        pretrained=True,
        pretrained_cfg_overlay={"file": weights},
        **case.get("create", {}).get("kwargs", {}),
    ).eval()
    seen: dict[str, torch.Tensor] = {}
    places = {"patch_embed (B,N,C)": model.patch_embed, "positional convolution (B,N,C)": model.pos_conv}
    places |= {f"block{i} (B,1+N,C)": model.blocks[i] for i in (0, 5, 11)}
    for name, module in places.items():
        module.register_forward_hook(lambda _m, _i, out, k=name: seen.__setitem__(k, out))
    with torch.no_grad():
        tokens, anchors = model.forward_features(_input(case), return_anchors=True)
        seen |= {"norm (B,tokens,C)": tokens, "logits": model.forward_head(tokens)}
    recorded = dict(case["outputs"])
    expected = recorded.pop("anchors (B,calls,2)")
    assert list(anchors.shape) == expected["shape"]
    assert anchors.flatten().tolist() == np.asarray(expected["values"]).flatten().tolist()
    assert seen.keys() == recorded.keys()
    for name, value in recorded.items():
        assert_golden(seen[name], value, 1e-5, name)


def test_gradient_norms_are_the_authors(model: PolyViT) -> None:
    case = next(c for c in GOLDEN["cases"] if "grad_norms" in c)
    norms = gradient_norms(model, _input(case))
    model.zero_grad()
    assert norms.keys() == case["grad_norms"].keys()
    noise = set(case.get("grad_norms_rounding_noise", ()))
    far = {k: n for k, n in norms.items() if k not in noise and abs(n / case["grad_norms"][k] - 1) > 1e-3}
    assert far == {}


def test_names_are_the_authors(model: PolyViT) -> None:
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == GOLDEN["state_dict"]


def test_class_does_not_change_over_50_shifts(model: PolyViT) -> None:
    x = image((1, 3, 224, 224), 11)
    shifts = np.random.RandomState(0).randint(0, 224, (50, 2)).tolist()
    with torch.inference_mode():
        expected = model(x)
        for shift in shifts:
            out = model(x.roll(tuple(shift), (2, 3)))
            assert out.argmax() == expected.argmax(), shift
            assert relative_difference(out, expected) < 5e-6, shift


@pytest.mark.parametrize("pool", ["token", "avg", "max", "map"])
def test_every_pooling_is_invariant(pool: str) -> None:
    model, x = _small(global_pool=pool).eval(), image((2, 3, 64, 64), 1)
    with torch.no_grad():
        assert relative_difference(model(x.roll((13, 50), (2, 3))), model(x)) < 5e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_any_square_multiple_of_the_patch_runs(dynamic: bool) -> None:
    model = _small(dynamic_img_size=dynamic).eval()
    with torch.no_grad():
        for side in (16, 48, 96):
            tokens, maps = model.forward_intermediates(image((2, 3, side, side)))
            assert tokens.shape == (2, 1 + (side // 16) ** 2, 32)
            assert [m.shape[-1] for m in maps] == [side // 16] * 3
            assert torch.equal(model.forward_features(image((2, 3, side, side))), tokens)


def test_dynamic_size_changes_nothing() -> None:
    x = image((2, 3, 64, 64))
    with torch.no_grad():
        assert relative_difference(_small(dynamic_img_size=True).eval()(x), _small().eval()(x)) < 1e-6


def test_patch_size_can_be_set() -> None:
    model = _small().eval()
    model.set_input_size(64, patch_size=8)
    x = image((1, 3, 64, 64))
    with torch.no_grad():
        tokens, anchors = model.forward_features(x, return_anchors=True)
        assert tokens.shape == (1, 65, 32)
        assert int(anchors.max()) < 8
        assert relative_difference(model(x.roll((3, 21), (2, 3))), model(x)) < 5e-6


def test_position_convolution_is_grouped_with_the_stem() -> None:
    from timm.models._manipulate import group_parameters

    model = _small()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["pos_conv.proj.weight"] == groups["patch_embed.proj.weight"] == groups["cls_token"]


def test_initialisation_survives_materialising() -> None:
    model = _small(device="meta")
    model.to_empty(device="cpu")
    model.init_weights()
    assert [k for k, p in model.named_parameters() if not torch.isfinite(p).all()] == []
    assert 0 < float(model.pos_conv.proj.weight.detach().abs().max()) <= 1 / 3 + 1e-6


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="img_size 225x225 is not a square whose side is a multiple of 16"):
        vitzoo.create_model("vit_small_patch16_224_poly", img_size=225)
    with pytest.raises(ValueError, match="img_size 224x160 is not a square"):
        vitzoo.create_model("vit_base_patch16_224_poly", img_size=(224, 160))
    model = _small()
    with pytest.raises(ValueError, match="img_size 60x60 is not a square"):
        model.set_input_size(60)
    with pytest.raises(ValueError, match="patch_size 8x16 is not a square"):
        model.set_input_size(64, patch_size=(8, 16))
    with pytest.raises(ValueError, match="input 64x80 is not a square"):
        model(torch.zeros(1, 3, 64, 80))
    with pytest.raises(ValueError, match="input 72x72 is not a square"):
        model.forward_intermediates(torch.zeros(1, 3, 72, 72))
    with pytest.raises(TypeError, match="pos_embed"):
        vitzoo.create_model("vit_small_patch16_224_poly", pos_embed="learn")
