from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.checkpoint import CheckpointError
from vitzoo.models.litv2 import DeformableMerge, LITv2
from vitzoo.testing import (
    assert_golden,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

CLASSIFIERS = ["litv2/litv2_small", "litv2/litv2_small_alpha0.5", "litv2/litv2_medium"]
CASES = [
    pytest.param(name, i, id=f"{name.split('/')[1]}-{i}")
    for name in CLASSIFIERS
    for i in range(len(load_golden(name)["cases"]))
]
DENSE = "litv2/litv2_small_features"
TINY: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 4), "num_classes": 5}


def _file(folder: Path, weights: dict[str, Tensor], key: str = "model", prefix: str = "") -> dict[str, str]:
    """Save weights as the authors do, with training state beside them, and return timm's overlay."""
    path = folder / "weights.pth"
    named = {f"{prefix}{k}": v for k, v in weights.items()}
    if prefix:
        named |= {"neck.lateral.weight": torch.ones(2), "decode_head.conv_seg.weight": torch.ones(2)}
    torch.save({key: named, "epoch": 299, "optimizer": {"state": {}, "param_groups": []}}, path)
    return {"file": str(path)}


def _tiny(seed: int = 0, **kwargs: Any) -> LITv2:
    """A small model whose mergings displace, as trained ones do."""
    torch.manual_seed(seed)
    model = LITv2(**{**TINY, **kwargs})
    for module in model.modules():
        if isinstance(module, DeformableMerge):
            nn.init.normal_(module.dconv.conv_offset.weight, std=0.3)
    return model.eval()


def _map(x: Tensor) -> Tensor:
    """(B, H, W, C) as recorded, (B, H*W, C)."""
    return x.flatten(1, 2)


def _observe(model: nn.Module, seen: dict[str, Tensor]) -> None:
    """Record what golden files record of the inside."""

    def keep(name: str, as_recorded: Any) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = as_recorded(module, args[0], out)

        return hook

    def own_output(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        return _map(out)

    def offsets(module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        return module.offsets(x)

    model.patch_embed.register_forward_hook(keep("patch_embed", own_output))
    model.norm.register_forward_hook(keep("norm", own_output))
    for i, stage in enumerate(model.layers, 1):
        stage.register_forward_hook(keep(f"stage{i}", own_output))
        if i < 4:
            stage.downsample.register_forward_hook(keep(f"stage{i} merged", own_output))
            stage.downsample.dconv.register_forward_hook(keep(f"stage{i} token-merging offsets", offsets))


@pytest.mark.parametrize(("name", "index"), CASES)
def test_litv2_golden(name: str, index: int, tmp_path: Path) -> None:
    golden = load_golden(name)
    case = golden["cases"][index]
    kwargs = case.get("create", {}).get("kwargs", {})
    overlay = _file(tmp_path, golden_state_dict(golden))
    model = vitzoo.create_model(golden["name"], pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model.eval()
    seen: dict[str, Tensor] = {}
    _observe(model, seen)
    x = image(case["input"], case["seed"])
    with torch.inference_mode():
        seen["logits"] = model(x)
        seen["pooled"] = model.forward_head(model.forward_features(x), pre_logits=True)
    for what, recorded in case["outputs"].items():
        assert_golden(seen[what.split(" (")[0]], recorded, 1e-5, what)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_litv2_gradients_of_one_image(memory_format: torch.memory_format) -> None:
    golden = load_golden("litv2/litv2_small")
    case = golden["cases"][0]
    model = vitzoo.create_model("litv2_small").eval()
    model.load_state_dict(golden_state_dict(golden), strict=False)
    x = image(case["input"], case["seed"]).contiguous(memory_format=memory_format)
    ours = gradient_norms(model.to(memory_format=memory_format), x)
    assert ours.keys() == case["grad_norms"].keys()
    for key, norm in case["grad_norms"].items():
        assert ours[key] == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_a_batch_of_one_are_right(training: bool) -> None:
    # torch 2.14.1 on CPU: the backward of BatchNorm is wrong, in every dtype, for a single NCHW image whose gradient
    # arrives transposed. The same image twice has the same statistics, twice the gradient, and no such fault.
    x = image((1, 3, 96, 64)).double()
    one, two = (_tiny().double().train(training) for _ in range(2))
    one(x).sum().backward()
    two(x.repeat(2, 1, 1, 1)).sum().backward()
    for (key, ours), reference in zip(one.named_parameters(), two.parameters(), strict=True):
        # in training a shift before BatchNorm has no effect: its gradient is rounding noise
        if not (training and key.endswith("dconv.bias")):
            assert relative_difference(2 * ours.grad, reference.grad) < 1e-9, key


@pytest.mark.parametrize("index", [0, 1], ids=["128x192", "115x150"])
def test_dense_prediction_golden(index: int, tmp_path: Path) -> None:
    golden = load_golden(DENSE)
    case = golden["cases"][index]
    overlay = _file(tmp_path, golden_state_dict(golden), "state_dict", "backbone.")
    model = vitzoo.create_model(
        "litv2_small",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        features_only=True,
        feature_norm=True,
    ).eval()
    with torch.inference_mode():
        maps = model(image(case["input"], case["seed"]))
    assert len(maps) == len(case["outputs"]) == 4
    for ours, (what, recorded) in zip(maps, case["outputs"].items(), strict=True):
        assert_golden(ours, recorded, 1e-5, what)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]


def test_maps_are_unnormalised_stage_outputs_unless_asked(tmp_path: Path) -> None:
    model, normed = _tiny(), _tiny(feature_norm=True)
    normed.load_state_dict(model.state_dict(), strict=False)
    x = image((2, 3, 64, 96))
    stages = []
    for stage in model.layers:
        stage.register_forward_hook(lambda _, __, out: stages.append(out))
    final, plain = model.forward_intermediates(x)
    assert relative_difference(final, model.forward_features(x)) == 0
    assert relative_difference(final.permute(0, 2, 3, 1), model.norm(stages[3])) < 1e-6
    for i, y in enumerate(normed.forward_intermediates(x, intermediates_only=True)):
        assert torch.equal(plain[i], stages[i].permute(0, 3, 1, 2))
        expected = nn.functional.layer_norm(stages[i], stages[i].shape[-1:]).permute(0, 3, 1, 2)
        assert relative_difference(y, expected) < 1e-6
    assert relative_difference(normed(x), model(x)) == 0, "the classifier does not change"


def test_detection_form_leaves_the_first_map_alone() -> None:
    plain, model = _tiny(), _tiny(feature_norm=(1, 2, 3))
    model.load_state_dict(plain.state_dict(), strict=False)
    x = image((1, 3, 64, 64))
    maps, ours = (m.forward_intermediates(x, intermediates_only=True) for m in (plain, model))
    assert torch.equal(ours[0], maps[0])
    assert all(relative_difference(a, b) > 1e-2 for a, b in zip(ours[1:], maps[1:], strict=True))
    assert not hasattr(model, "norm0")


def test_pruning_leaves_no_unused_parameter() -> None:
    model = _tiny(feature_norm=True)
    x = image((1, 3, 64, 64))
    before = model.forward_intermediates(x, indices=(1, 2), intermediates_only=True)
    assert model.prune_intermediate_layers((1, 2), prune_norm=True) == [1, 2]
    after = model.forward_intermediates(x, indices=(1, 2), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sum(y.sin().sum() for y in after).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classification_file_starts_dense_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    golden = load_golden("litv2/litv2_small")
    overlay = _file(tmp_path, golden_state_dict(golden))
    kwargs: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
    x = image((1, 3, 64, 64))
    with torch.inference_mode():
        plain = timm.create_model("litv2_small", **kwargs).eval()(x)
        normed = timm.create_model("litv2_small", feature_norm=True, **kwargs).eval()(x)
    assert "they start untrained" in caplog.text
    for a, b in zip(plain, normed, strict=True):
        expected = nn.functional.layer_norm(a.permute(0, 2, 3, 1), (a.shape[1],)).permute(0, 3, 1, 2)
        assert relative_difference(b, expected) < 1e-5


@pytest.mark.parametrize(
    "kwargs", [{}, {"features_only": True}, {"feature_norm": True}], ids=["classifier", "features", "norms"]
)
def test_dense_prediction_file_is_refused_elsewhere(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    overlay = _file(tmp_path, golden_state_dict(load_golden(DENSE)), "state_dict", "backbone.")
    with pytest.raises(CheckpointError, match=r"pass features_only=True, feature_norm=\(0, 1, 2, 3\)"):
        vitzoo.create_model("litv2_small", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_detection_file_loads_by_its_tag(tmp_path: Path) -> None:
    weights = golden_state_dict(load_golden(DENSE))
    weights = {k: v for k, v in weights.items() if not k.startswith("norm0.")}
    overlay = _file(tmp_path, weights, "state_dict", "backbone.")
    kwargs: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
    model = vitzoo.create_model("litv2_small.mask_rcnn_ws4_coco", **kwargs)
    assert model.model.window_sizes == (0, 0, 4, 1)
    assert torch.equal(model.model.norm2.weight, weights["norm2.weight"])
    with pytest.raises(CheckpointError, match=r"feature_norm=\(1, 2, 3\)"):
        vitzoo.create_model("litv2_small", feature_norm=True, **kwargs)


def test_file_of_another_alpha_names_its_tag(tmp_path: Path) -> None:
    overlay = _file(tmp_path, golden_state_dict(load_golden("litv2/litv2_small_alpha0.5")))
    with pytest.raises(
        CheckpointError, match=r"does not fit litv2_small .*It fits litv2_small\.alpha0\.5_in1k:"
    ):
        vitzoo.create_model("litv2_small", pretrained=True, pretrained_cfg_overlay=overlay)
    model = vitzoo.create_model("litv2_small.alpha0.5_in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.layers[2].blocks[0].attn.l_heads == 6


def test_counters_of_the_authors_files_are_kept(tmp_path: Path) -> None:
    golden = load_golden("litv2/litv2_small")
    counters = {k: torch.tensor(7 + i) for i, k in enumerate(golden["constants"])}
    overlay = _file(tmp_path, {**golden_state_dict(golden), **counters})
    model = vitzoo.create_model("litv2_small", pretrained=True, pretrained_cfg_overlay=overlay)
    assert [int(model.state_dict()[k]) for k in counters] == [7, 8, 9]


@pytest.mark.parametrize("size", [(29, 29), (33, 61), (115, 150), (96, 256)], ids=str)
def test_any_size_equals_the_padded_image(size: tuple[int, int]) -> None:
    model = _tiny()
    x = image((2, 3, *size))
    padded = torch.zeros(2, 3, *(-(-s // 4) * 4 for s in size))
    padded[:, :, : size[0], : size[1]] = x
    assert relative_difference(model(x), model(padded)) < 1e-6
    assert model.forward_features(x).shape[2:] == tuple(-(-s // 4) // 8 for s in size)


@torch.no_grad()
def test_initialisation_is_the_authors_and_repeats_after_to_empty() -> None:
    torch.manual_seed(0)
    model = LITv2(**{**TINY, "embed_dim": 64})
    with torch.device("meta"):
        other = LITv2(**{**TINY, "embed_dim": 64})
    other.to_empty(device="cpu")
    for built in (model, other):
        if built is other:
            built.init_weights()
        mlp, merge = built.layers[1].blocks[0].mlp, built.layers[0].downsample
        assert float(mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.05)
        assert float(mlp.dwconv.dwconv.weight.std()) == pytest.approx((2 / 9) ** 0.5, rel=0.05)
        assert float(built.head.weight.std()) == pytest.approx(0.02, rel=0.1)
        bound = (64 * 4) ** -0.5
        assert float(merge.dconv.weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert float(merge.dconv.conv_offset.weight.abs().max()) == 0
        assert float(merge.norm_layer.running_var.mean()) == 1
        assert float(mlp.fc1.bias.abs().max()) == 0


def test_layer_groups_follow_the_network() -> None:
    model = _tiny()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = [
        "patch_embed.proj.weight",
        "layers.0.blocks.0.norm2.weight",
        "layers.0.downsample.dconv.weight",
        "layers.1.blocks.0.norm2.weight",
        "layers.3.blocks.0.norm2.weight",
        "norm.weight",
    ]
    numbers = [groups[name] for name in order]
    assert numbers == sorted(numbers)
    assert numbers[1] < numbers[2] < numbers[3]


def test_litv2_compiles_whole_and_gives_the_same_gradients() -> None:
    model = _tiny().train()
    x = image((2, 3, 64, 72))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    ours = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for key, parameter in model.named_parameters():
        assert relative_difference(ours[key], parameter.grad) < 1e-5 or key.endswith("dconv.bias"), key


def test_litv2_in_bfloat16_and_under_autocast() -> None:
    model = _tiny()
    x = image((2, 3, 115, 150))
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_difference(model(x), expected) < 3e-2
        assert relative_difference(model.bfloat16()(x.bfloat16()), expected) < 3e-2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": (1, 1, 1)}, "must have one entry a stage each"),
        ({"window_sizes": (0, 0, -2, 1)}, "has a negative entry"),
        ({"alpha": -0.1}, "alpha -0.1 is not a share of heads"),
        ({"feature_norm": (1, 4)}, r"feature_norm \(1, 4\) names maps that are not in 0 \.\. 3"),
        ({"global_pool": "token"}, "global_pool 'token' is not one of"),
    ],
    ids=["depths", "windows", "alpha", "feature_norm", "pool"],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LITv2(**{**TINY, **kwargs})


def test_an_image_too_small_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="a 1x2 map is smaller than the kernel, 2: pass a larger image"):
        _tiny()(image((1, 3, 28, 40)))


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input has shape \(1, 4, 64, 64\), expected \(B, 3, H, W\)"):
        _tiny()(image((1, 4, 64, 64)))
