from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import vitzoo
from vitzoo.models.twins_poly import PolyTwins
from vitzoo.testing import (
    assert_golden,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

GOLDEN = load_golden("polyphase/twins_svt_small_poly")


def _case_id(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["input"])) + ("-roll" if "roll" in case else "")


CASES = [pytest.param(c, id=_case_id(c)) for c in GOLDEN["cases"]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("twins") / "w.pth"
    torch.save({"model": golden_state_dict(GOLDEN)}, path)
    return str(path)


@pytest.fixture(scope="module")
def model(weights: str) -> PolyTwins:
    return vitzoo.create_model(
        "twins_svt_small_poly", pretrained=True, pretrained_cfg_overlay={"file": weights}
    ).eval()


def _input(case: dict[str, Any]) -> torch.Tensor:
    return image(case["input"], case["seed"]).roll(tuple(case.get("roll", (0, 0))), (2, 3))


def _small(**kwargs: Any) -> PolyTwins:
    torch.manual_seed(0)
    args = dict(embed_dims=(16, 16, 32, 32), depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), num_classes=5)
    return PolyTwins(**{**args, **kwargs})


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_anchors_are_the_authors(weights: str, case: dict[str, Any]) -> None:
    model = vitzoo.create_model(
        "twins_svt_small_poly",
        pretrained=True,
        pretrained_cfg_overlay={"file": weights},
        **case.get("create", {}).get("kwargs", {}),
    ).eval()
    seen: dict[str, torch.Tensor] = {}
    for i in range(4):
        stage = f"stage{i + 1}"
        model.patch_embeds[i].register_forward_hook(
            lambda _m, _i, out, k=f"{stage} embedding (B,H*W,C)": seen.__setitem__(k, out[0])
        )
        model.pos_block[i].register_forward_pre_hook(
            lambda _m, args, k=f"{stage} block0 before positional convolution (B,H*W,C)": seen.__setitem__(
                k, args[0]
            )
        )
        model.blocks[i][-1].register_forward_hook(
            lambda _m, _i, out, k=f"{stage} (B,H*W,C)": seen.__setitem__(k, out)
        )
    x = _input(case)
    with torch.no_grad():
        tokens, anchors = model.forward_features(x, return_anchors=True)
        seen |= {"norm (B,tokens,C)": tokens, "logits": model.forward_head(tokens)}
        maps = model.forward_intermediates(x, intermediates_only=True)
    recorded = dict(case["outputs"])
    expected = recorded.pop("anchors (B,calls,2)")
    assert list(anchors.shape) == expected["shape"]
    assert anchors.flatten().tolist() == np.asarray(expected["values"]).flatten().tolist()
    assert seen.keys() == recorded.keys()
    for name, value in recorded.items():
        assert_golden(seen[name], value, 1e-5, name)
    for i, m in enumerate(maps):
        assert_golden(m.flatten(2).transpose(1, 2), recorded[f"stage{i + 1} (B,H*W,C)"], 1e-5)


def test_gradient_norms_are_the_authors(model: PolyTwins) -> None:
    case = next(c for c in GOLDEN["cases"] if "grad_norms" in c)
    norms = gradient_norms(model, _input(case))
    model.zero_grad()
    assert norms.keys() == case["grad_norms"].keys()
    noise = set(case.get("grad_norms_rounding_noise", ()))
    far = {k: n for k, n in norms.items() if k not in noise and abs(n / case["grad_norms"][k] - 1) > 1e-3}
    assert far == {}


def test_class_does_not_change_over_50_shifts(model: PolyTwins) -> None:
    x = image((1, 3, 224, 224), 11)
    shifts = np.random.RandomState(0).randint(0, 224, (50, 2)).tolist()
    with torch.inference_mode():
        expected = model(x)
        for shift in shifts:
            out = model(x.roll(tuple(shift), (2, 3)))
            assert out.argmax() == expected.argmax(), shift
            assert relative_difference(out, expected) < 5e-6, shift


def test_class_does_not_change_with_fresh_weights() -> None:
    # equal weights in the embeddings' norms would tie every phase; rounding would choose
    model, x = _small().eval(), image((1, 3, 224, 224), 5)
    assert all(embed.norm.weight.detach().std() > 0.01 for embed in model.patch_embeds)
    with torch.inference_mode():
        expected = model(x)
        for shift in np.random.RandomState(1).randint(0, 224, (10, 2)).tolist():
            assert relative_difference(model(x.roll(tuple(shift), (2, 3))), expected) < 5e-6, shift


def test_plain_twins_weights_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("twins_svt_small").eval()
    torch.save(plain.state_dict(), tmp_path / "twins.pth")
    model = vitzoo.create_model(
        "twins_svt_small_poly", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "twins.pth")}
    ).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def test_unanchored_blocks_are_timms(model: PolyTwins) -> None:
    plain = timm.create_model("twins_svt_small").eval()
    plain.load_state_dict(model.state_dict())
    x = image((2, 28 * 28, 128), 2)
    with torch.no_grad():
        for ours, theirs in zip(model.blocks[1], plain.blocks[1], strict=True):
            for fused in (True, False):
                ours.attn.fused_attn = fused
                assert relative_difference(ours(x, (28, 28)), theirs(x, (28, 28))) < 1e-6
            ours.attn.fused_attn = True
        # the convolutions differ at the border alone
        ours, theirs = (m.pos_block[1](x, (28, 28)).unflatten(1, (28, 28)) for m in (model, plain))
        assert relative_difference(ours[:, 1:-1, 1:-1], theirs[:, 1:-1, 1:-1]) < 1e-6
        assert relative_difference(ours[:, 0], theirs[:, 0]) > 1e-2


def test_gradient_checkpointing_is_exact() -> None:
    model, x = _small().train(), image((2, 3, 224, 224))
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_pruning_drops_later_stages() -> None:
    model, x = _small().eval(), image((1, 3, 224, 224))
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        model.prune_intermediate_layers([1])
        tokens, (pruned,) = model.forward_intermediates(x, indices=[1])
    assert torch.equal(pruned, expected)
    assert tokens.shape == (1, 28 * 28, 16)
    assert len(model.blocks) == 2


def test_other_sizes_are_accepted() -> None:
    model = _small(img_size=448).eval()
    with torch.no_grad():
        assert model(image((1, 3, 448, 448))).shape == (1, 5)
        model.set_input_size(224)
        assert model._traits["img_size"] == (224, 224)
        assert model.patch_embeds[3].num_patches == 49
        assert model(image((1, 3, 224, 224))).shape == (1, 5)


def test_initialisation_survives_materialising() -> None:
    model = _small(device="meta")
    model.to_empty(device="cpu")
    model.init_weights()
    fresh = _small()
    for name, p in fresh.named_parameters():
        other = model.get_parameter(name)
        assert torch.isfinite(other).all(), name
        assert float(other.detach().abs().mean()) == pytest.approx(
            float(p.detach().abs().mean()), rel=0.5, abs=1e-6
        ), name


def test_bad_sizes_are_refused(model: PolyTwins) -> None:
    message = "224x448 is not a square whose side is a multiple of 224"
    with pytest.raises(ValueError, match=f"img_size {message}"):
        vitzoo.create_model("twins_svt_small_poly", img_size=(224, 448))
    with pytest.raises(ValueError, match="img_size 256x256 is not a square"):
        vitzoo.create_model("twins_svt_base_poly", img_size=256)
    with pytest.raises(ValueError, match="img_size 300x300 is not a square"):
        model.set_input_size(300)
    with pytest.raises(ValueError, match=f"input {message}"):
        model(torch.zeros(1, 3, 224, 448))
    with pytest.raises(ValueError, match="input 112x112 is not a square"):
        model.forward_intermediates(torch.zeros(1, 3, 112, 112))
    with pytest.raises(ValueError, match="global_pool 'max' is not one of"):
        vitzoo.create_model("twins_svt_small_poly", global_pool="max")
    with pytest.raises(ValueError, match="global_pool 'token' is not one of"):
        model.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="output_fmt 'NLC' is not available"):
        model.forward_intermediates(torch.zeros(1, 3, 224, 224), output_fmt="NLC")
