"""Vim: the authors' numbers, its position tables, the float32 residual, drop path, export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn

import vitzoo
from vitzoo.checkpoint import CheckpointError
from vitzoo.models.vim import Block, VisionMamba, checkpoint_filter_fn
from vitzoo.testing import (
    assert_golden,
    golden_names,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

GOLDENS = golden_names("vim")
WITH_GRADIENTS = [n for n in GOLDENS if any("grad_norms" in c for c in load_golden(n)["cases"])]
# the fields of a golden file's `outputs` -> the module that gives them, and which part of its output
_PLACES = {
    "patch_embed (B,N,C)": ("patch_embed", None),
    "tokens_in (B,L,C)": ("pos_drop", None),
}


def _load(golden: dict[str, Any], case: dict[str, Any], folder: Path, key: str = "model") -> VisionMamba:
    path = folder / "weights.pth"
    torch.save({key: golden_state_dict(golden), "epoch": 299}, path)
    kwargs = golden["create"].get("kwargs", {}) | case.get("create", {}).get("kwargs", {})
    model = vitzoo.create_model(
        golden["create"]["name"], pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs
    )
    return model.eval()


def _small(**kwargs) -> VisionMamba:
    torch.manual_seed(0)
    args = dict(img_size=64, embed_dim=32, depth=3, num_classes=5) | kwargs
    model = VisionMamba(**args)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def _record(model: VisionMamba, case: dict[str, Any]) -> dict[str, Tensor]:
    """Run a case and return every output that the golden file names."""
    found: dict[str, Tensor] = {}

    def keep(what: str, part: int | None, out: Any) -> None:
        found[what] = out if part is None else out[part]

    for what in case["outputs"].keys() - {"logits", "features (B,C)"}:
        path, part = _place(what)
        hook = partial(keep, what, part)
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, hook=hook: hook(out))
    with torch.no_grad():
        tokens = model.forward_features(image(case["input"], case["seed"]))
        found["features (B,C)"] = model.forward_head(tokens, pre_logits=True)
        found["logits"] = model.forward_head(tokens)
    return found


def _place(what: str) -> tuple[str, int | None]:
    if what.startswith("layer"):
        layer, part = what.split(" ")[:2]
        return f"layers.{layer.removeprefix('layer')}", ("hidden", "residual").index(part)
    return _PLACES[what]


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    for case in golden["cases"]:
        model = _load(golden, case, tmp_path)
        assert sum(p.numel() for p in model.parameters()) == golden["params"]
        found = _record(model, case)
        for what, recorded in case["outputs"].items():
            assert_golden(found[what], recorded, what=f"{name}: {what}")


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_golden_gradients(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    for case in golden["cases"]:
        model = _load(golden, case, tmp_path)
        norms = gradient_norms(model, image(case["input"], case["seed"]))
        assert norms.keys() == case["grad_norms"].keys()
        for key, recorded in case["grad_norms"].items():
            assert abs(norms[key] - recorded) <= 1e-3 * recorded, key


def test_moving_average_of_a_file_is_taken_on_request(tmp_path: Path) -> None:
    golden = load_golden("vim/vim_tiny_patch16_224")
    weights = golden_state_dict(golden)
    average = {k: v + 1 for k, v in weights.items()}
    torch.save({"model": weights, "model_ema": average}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    name = golden["create"]["name"]
    plain = vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    ema = vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, use_ema=True)
    assert torch.equal(plain.norm_f.weight, weights["norm_f.weight"])
    assert torch.equal(ema.norm_f.weight, average["norm_f.weight"])


def _resampled(table: Tensor, size: tuple[int, int]) -> Tensor:
    """The authors' loader in its own terms: row 0 apart, the rest a square map."""
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


@pytest.mark.parametrize(
    ("kwargs", "grid"),
    [
        (dict(img_size=96), (6, 6)),
        (dict(img_size=(96, 48)), (6, 3)),
        (dict(img_size=64, stride=8), (7, 7)),
        (dict(img_size=(70, 64)), (4, 4)),
    ],
    ids=["larger", "oblong", "stride8", "ragged"],
)
def test_position_table_of_another_grid_is_resampled(kwargs: dict[str, Any], grid: tuple[int, int]) -> None:
    source, model = _small(), _small(**kwargs)
    weights = checkpoint_filter_fn(source.state_dict(), model)
    model.load_state_dict(weights)
    torch.testing.assert_close(model.pos_embed.detach(), _resampled(source.pos_embed.detach(), grid))


def test_stride8_model_starts_from_the_stride16_file(tmp_path: Path) -> None:
    golden = load_golden("vim/vim_tiny_patch16_224")
    weights = golden_state_dict(golden)
    torch.save({"model": weights}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    name = "vim_tiny_patch16_stride8_224"
    model = vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.pos_embed.detach(), _resampled(weights["pos_embed"], (27, 27)))


def test_table_that_is_no_square_grid_is_refused(tmp_path: Path) -> None:
    name = "vim_tiny_patch16_224"
    torch.save({"model": vitzoo.create_model(name, img_size=(64, 48)).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="13 rows, 197 are needed, and 12 patches are no square grid"):
        vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})


@pytest.mark.parametrize("size", [(96, 96), (48, 80)], ids=["square", "oblong"])
def test_set_input_size_dynamic_size_and_loading_agree(size: tuple[int, int]) -> None:
    model = _small()
    built = _small(img_size=size)
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    dynamic = _small(dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = image((2, 3, *size))
    model.pos_embed.requires_grad_(False)
    model.set_input_size(size)
    assert not model.pos_embed.requires_grad
    with torch.no_grad():
        expected = built(x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(dynamic(x), expected)
        maps = dynamic.forward_intermediates(x, intermediates_only=True)
    assert maps[0].shape == (2, 32, size[0] // 16, size[1] // 16)


def test_oblong_grid_keeps_its_shape_when_resized() -> None:
    model = _small(img_size=(96, 32))
    table = model.pos_embed.detach()
    model.set_input_size((48, 64))
    grid = table[:, 1:].reshape(1, 6, 2, 32).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(3, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), grid.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((1, 3, 96, 64), {}, "input is 96x64, the model was built for 64x64"),
        ((1, 4, 64, 64), {}, r"input has shape \(1, 4, 64, 64\), expected \(B, 3, H, W\)"),
        ((3, 64, 64), {}, r"input has shape \(3, 64, 64\)"),
        ((1, 3, 64, 15), dict(dynamic_img_size=True), "input is 64x15, smaller than one patch of 16x16"),
    ],
    ids=["size", "channels", "no_batch", "tiny"],
)
def test_inputs_that_do_not_fit_are_refused(
    shape: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**kwargs)(torch.zeros(shape))


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"img_size \(64, 8\) is smaller than one patch"):
        _small(img_size=(64, 8))
    with pytest.raises(ValueError, match="smaller than one patch"):
        _small().set_input_size(8)
    with pytest.raises(ValueError, match="global_pool 'max' is not one of"):
        _small(global_pool="max")


def test_taps_are_the_residual_stream_without_the_class_token() -> None:
    model = _small(img_size=(64, 48))  # a 4 x 3 grid, the class token is token 6 of 13
    x = image((2, 3, 64, 48))
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    for index, found in enumerate(maps):
        stream = seen[index][0] + seen[index][1]
        patches = stream[:, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]]
        assert torch.equal(found, patches.transpose(1, 2).reshape(2, 32, 4, 3))
        expected = nn.functional.rms_norm(patches, (32,), model.norm_f.weight, 1e-5)
        torch.testing.assert_close(normed[index], expected.transpose(1, 2).reshape(2, 32, 4, 3))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.head(final[:, 6]))
        model.reset_classifier(5, "avg")
        average = final[:, [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]].mean(1)
        torch.testing.assert_close(model.forward_head(final), model.head(average))


def test_drop_path_follows_the_authors_schedule() -> None:
    model = _small(depth=5, drop_path_rate=0.4)
    rates = [b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for b in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3])
    assert model.drop_path.drop_prob == pytest.approx(0.4)


def test_drop_path_falls_on_what_comes_in() -> None:
    torch.manual_seed(0)
    block = Block(16, drop_path=0.5).train()
    hidden, residual = torch.randn(64, 5, 16), torch.randn(64, 5, 16)
    stream = block(hidden, residual)[1]
    kept = (stream != residual).flatten(1).any(1)
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(stream[kept], (residual + 2 * hidden)[kept])


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_is_close_and_keeps_a_float32_residual(mode: str) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model("vim_tiny_patch16_224", num_classes=10).eval()
    x = image((1, 3, 224, 224))
    dtypes = []
    with torch.no_grad():
        expected = model.forward_features(x)
        for layer in model.layers:
            layer.register_forward_hook(lambda _m, _i, out: dtypes.append((out[0].dtype, out[1].dtype)))
        if mode == "weights":
            found = model.to(torch.bfloat16).forward_features(x.bfloat16())
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = model.forward_features(x)
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert relative_difference(found.float(), expected) < 0.03


def test_float64_and_float32_agree() -> None:
    model = _small()
    x = image((1, 3, 64, 64))
    with torch.no_grad():
        single = model(x)
        double = model.double()(x.double())
    assert double.dtype == torch.float64
    assert relative_difference(single, double) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_fx_trace_keeps_checks_and_scans_whole(dynamic: bool) -> None:
    model = _small(dynamic_img_size=dynamic)
    nodes = ["layers.1.mixer.out_proj", "head"]
    traced = create_feature_extractor(model, nodes)
    names = [n.target.__name__ for n in traced.graph.nodes if n.op == "call_function"]
    assert names.count("bidirectional_selective_scan") == 3
    assert names.count("check_input") == 1
    x = image((2, 3, 64, 64))
    with torch.no_grad():
        found = traced(x)
        torch.testing.assert_close(found["head"], model(x))
    with pytest.raises(ValueError, match="input has shape"):
        traced(x[:, :2])


def test_gradients_at_batch_1_are_half_those_of_the_image_twice() -> None:
    model = _small()
    x = image((1, 3, 64, 64))
    grads = []
    for batch in (x, torch.cat((x, x))):
        model.zero_grad()
        model(batch).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_difference(2 * grads[0], grads[1]) < 1e-5


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model("vim_tiny_patch16_224")
    out_proj = model.layers[0].mixer.out_proj.weight
    # PyTorch's uniform bound, 1 / sqrt(384), over sqrt(depth)
    bound = 384**-0.5 * 24**-0.5
    assert 0.95 * bound < out_proj.abs().max() <= bound * (1 + 1e-6)
    assert abs(model.pos_embed.std() - 0.02) < 1e-3
    assert abs(model.head.weight.std() - 0.02) < 1e-3
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()


def test_weights_can_be_initialised_after_meta() -> None:
    with torch.device("meta"):
        model = vitzoo.create_model("vim_tiny_patch16_224", depth=2)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    steps = nn.functional.softplus(model.layers[1].mixer.dt_proj_b.bias)
    assert steps.min() > 0.99e-3
    assert steps.max() < 1.01e-1
    bound = 384**-0.5 * 2**-0.5
    assert 0.95 * bound < model.layers[1].mixer.out_proj.weight.abs().max() <= bound * (1 + 1e-6)
    assert torch.equal(model.norm_f.weight, torch.ones(192))
    with torch.no_grad():
        assert torch.isfinite(model.eval()(image((1, 3, 224, 224)))).all()


def test_no_weight_decay_covers_state_and_positions() -> None:
    from timm.optim import param_groups_weight_decay

    model = _small()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = [k for k, p in model.named_parameters() if id(p) in decayed]
    assert names
    assert all(k.endswith(".weight") for k in names)
    assert "layers.0.mixer.in_proj.weight" in names
