from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitzoo
from vitzoo.checkpoint import CheckpointError
from vitzoo.models.cvt import CvT
from vitzoo.testing import (
    assert_golden,
    fill,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

GOLDEN = load_golden("cvt/cvt_13")
CASES = [pytest.param(c, id="x".join(map(str, c["input"]))) for c in GOLDEN["cases"]]
MODELS = ("cvt_13", "cvt_21", "cvt_13_384", "cvt_21_384", "cvt_w24_384")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CvT:
    path = tmp_path_factory.mktemp("cvt") / "CvT-13-224x224-IN-1k.pth"
    torch.save(golden_state_dict(GOLDEN), path)  # flat, as the authors' test script reads it
    overlay = {"file": str(path)}
    return vitzoo.create_model("cvt_13", pretrained=True, pretrained_cfg_overlay=overlay).eval()


def _small(**kwargs: Any) -> CvT:
    torch.manual_seed(0)
    return CvT(embed_dims=(16, 32, 48), depths=(1, 1, 2), num_heads=(1, 2, 3), num_classes=7, **kwargs)


def _gradients(model: CvT, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the same function of each image's logits, summed over the batch."""
    model.zero_grad()
    logits = model(x)
    (logits * image((1, logits.shape[1]), 7)).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_authors(model: CvT, case: dict[str, Any]) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for i in range(3):
        stage = model.get_submodule(f"stage{i}")

        def embedded(_m, _i, out, key=f"stage{i + 1} embedding (B,C,H,W)"):
            tokens, size = out
            seen[key] = tokens.unflatten(1, size).permute(0, 3, 1, 2)

        hooks.append(stage.patch_embed.register_forward_hook(embedded))

    def last_block(_m, _i, out):
        seen["stage3 class token (B,1,C)"] = out[:, :1]

    hooks.append(model.stage2.blocks[-1].register_forward_hook(last_block))
    x = image(case["input"], case["seed"])
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        seen["logits"] = model.forward_head(features)
        assert torch.equal(model(x), seen["logits"])
    seen |= {f"stage{i + 1} (B,C,H,W)": m for i, m in enumerate(maps)}
    for hook in hooks:
        hook.remove()
    assert seen.keys() == case["outputs"].keys()
    for name, recorded in case["outputs"].items():
        assert_golden(seen[name], recorded, 1e-5, name)


def test_gradient_norms_are_the_authors(model: CvT) -> None:
    case = next(c for c in GOLDEN["cases"] if "grad_norms" in c)
    norms = gradient_norms(model, image(case["input"], case["seed"]))
    model.zero_grad()
    assert norms.keys() == case["grad_norms"].keys()
    noise = set(case["grad_norms_rounding_noise"])
    far = {k: n for k, n in norms.items() if k not in noise and abs(n / case["grad_norms"][k] - 1) > 1e-3}
    assert far == {}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_one_image_are_half_of_two(train: bool, layout: str, dtype: torch.dtype) -> None:
    # torch 2.14.1 on CPU: BatchNorm's backward is wrong for one NCHW image whose gradient arrives transposed
    model = _small().to(dtype).train(train)
    x = image((1, 3, 64, 96), 3).to(dtype)
    if layout == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    one, two = _gradients(model, x), _gradients(model, torch.cat((x, x)))
    for name, grad in two.items():
        if grad.norm() > 1e-4:  # key biases have none in exact arithmetic
            assert relative_difference(2 * one[name], grad) < 1e-4, name


@pytest.mark.parametrize("name", MODELS)
def test_variants_are_as_published(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == vitzoo.model_info(name).params
    size = model.pretrained_cfg["input_size"]
    features = model.forward_features(torch.empty(2, *size, device="meta"))
    assert features.shape == (2, 1 + (size[1] // 16) ** 2, model.num_features)
    assert [i["reduction"] for i in model.feature_info] == [4, 8, 16]
    assert model.stage2.blocks[0].attn.scale == model.num_features**-0.5


def test_checkpoint_of_another_depth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(golden_state_dict(GOLDEN), path)
    with pytest.raises(CheckpointError, match=r"does not fit cvt_21 .* It fits cvt_13, cvt_13_384"):
        vitzoo.create_model("cvt_21", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@pytest.mark.parametrize("size", [(3, 5), (33, 47), (224, 160)], ids=str)
def test_any_size_runs(size: tuple[int, int]) -> None:
    model = _small().eval()
    with torch.no_grad():
        maps = model.forward_intermediates(image((2, 3, *size)), intermediates_only=True)
        logits = model(image((2, 3, *size)))
    height, width = ((s - 3) // 4 + 1 for s in size)
    for i, m in enumerate(maps):
        assert m.shape == (2, (16, 32, 48)[i], height, width)
        assert m.is_contiguous()
        height, width = (height + 1) // 2, (width + 1) // 2
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


def test_unfused_attention_is_equal(model: CvT) -> None:
    x = image((1, 3, 64, 64))
    with torch.no_grad():
        expected = model(x)
        blocks = [b for i in range(3) for b in model.get_submodule(f"stage{i}").blocks]
        for block in blocks:
            block.attn.fused_attn = False
        unfused = model(x)
        for block in blocks:
            block.attn.fused_attn = True
    assert relative_difference(unfused, expected) < 1e-5


def test_norms_are_computed_in_float32() -> None:
    from vitzoo.models.cvt import LayerNorm

    norm = LayerNorm(16)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(fill("weight", (16,))))
        norm.bias.copy_(torch.from_numpy(fill("bias", (16,))))
    half = norm.to(torch.bfloat16)
    x = (1000 + 10 * image((4, 16))).to(torch.bfloat16)
    out = half(x)
    parameters = half.weight.float(), half.bias.float()
    exact = torch.nn.functional.layer_norm(x.float(), (16,), *parameters, half.eps)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
    assert norm.double()(x.double()).dtype == torch.float64


def test_average_pooling_leaves_the_class_token_out() -> None:
    model = _small(global_pool="avg").eval()
    with torch.no_grad():
        x = model.forward_features(image((2, 3, 64, 64)))
        assert torch.equal(model.forward_head(x, pre_logits=True), x[:, 1:].mean(1))
        model.reset_classifier(0, "token")
        assert torch.equal(model.forward_head(x), x[:, 0])
        model.reset_classifier(0, "")
        assert torch.equal(model.forward_head(x), x)


def test_initialisation_survives_materialising() -> None:
    model = CvT(embed_dims=(16, 32, 48), depths=(1, 1, 2), num_heads=(1, 2, 3), device="meta")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
    assert abs(float(model.head.weight.detach().std()) - 0.02) < 2e-3
    assert abs(float(model.stage2.cls_token.detach().std()) - 0.02) < 8e-3
    assert torch.equal(model.stage0.blocks[0].attn.conv_proj_q.bn.running_var, torch.ones(16))


def test_drop_path_is_of_the_last_stage() -> None:
    model = _small(drop_path_rate=0.3)
    rates = [
        getattr(b.drop_path1, "drop_prob", 0.0)
        for i in range(3)
        for b in model.get_submodule(f"stage{i}").blocks
    ]
    assert rates == pytest.approx([0.0, 0.0, 0.0, 0.3])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="img_size 2x64 is too small"):
        vitzoo.create_model("cvt_13", img_size=(2, 64))
    with pytest.raises(ValueError, match="global_pool 'max' is not one of"):
        vitzoo.create_model("cvt_13", global_pool="max")
    with pytest.raises(ValueError, match="embed_dim 64 is not divisible by num_heads 5"):
        vitzoo.create_model("cvt_13", num_heads=(5, 3, 6))
    model = _small()
    with pytest.raises(ValueError, match="img_size 2x2 is too small"):
        model.set_input_size(2)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="global_pool 'token' needs the class token"):
        model.reset_classifier(3, "token")
