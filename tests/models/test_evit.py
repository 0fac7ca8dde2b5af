from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitzoo
from vitzoo.checkpoint import CheckpointError
from vitzoo.layers.token import patch_mask
from vitzoo.testing import (
    assert_golden,
    fill,
    golden_names,
    golden_state_dict,
    gradient_norms,
    image,
    load_golden,
    relative_difference,
)

CASES = [(name, number) for name in golden_names("evit") for number in range(len(load_golden(name)["cases"]))]
GRADED = [(name, number) for name, number in CASES if "grad_norms" in load_golden(name)["cases"][number]]
assert GRADED, "no golden file records gradients"
IDS = [f"{name.split('/')[1]}-{number}" for name, number in CASES]


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """Load a case's model from a file as the authors wrap it; small beside the forward pass."""
    folder = tmp_path_factory.mktemp("evit")

    def load(name: str, **kwargs: Any) -> nn.Module:
        golden = load_golden(name)
        path = folder / f"{golden['name']}.pth"
        if not path.exists():
            weights = golden_state_dict(golden)
            averaged = {k: torch.zeros_like(v) for k, v in weights.items()}
            torch.save({"model": weights, "model_ema": averaged, "epoch": 299}, path)
        overlay = {"file": str(path)}
        return vitzoo.create_model(
            golden["create"]["name"], pretrained=True, pretrained_cfg_overlay=overlay, **kwargs
        ).eval()

    return load


@pytest.fixture
def no_search(monkeypatch):
    """Skip the search for a variant that a refused file fits: it builds every model of the zoo."""
    monkeypatch.setattr("vitzoo.models._builder._variants_that_fit", lambda *args: [])


def _kwargs(case: dict[str, Any]) -> dict[str, Any]:
    return case.get("create", {}).get("kwargs", {})


def _recorded_integers(recorded: dict[str, Any]) -> np.ndarray:
    assert int(np.prod(recorded["shape"])) == np.asarray(recorded["values"]).size
    return np.asarray(recorded["values"], dtype=np.int64).reshape(recorded["shape"])


@pytest.mark.parametrize(("name", "number"), CASES, ids=IDS)
def test_outputs_are_the_authors(golden_model, name, number) -> None:
    case = load_golden(name)["cases"][number]
    model = golden_model(name, **_kwargs(case))
    seen: dict[str, Tensor] = {}

    def keep(key: str):
        return lambda module, args, out: seen.__setitem__(key, out)

    model.patch_embed.register_forward_hook(keep("patch_embed (B,N,C)"))
    model.norm.register_forward_hook(keep("norm (B,1+tokens,C)"))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{i} (B,1+tokens,C)"))
        block.attn.register_forward_hook(keep(f"block{i} attention"))
    x = image(case["input"], case["seed"])
    with torch.no_grad():
        seen["logits"] = model(x)
        found = dict(seen)
        _, kept = model.forward_features(x, return_kept=True)
    pruning = [i for i, block in enumerate(model.blocks) if block.keep_rate < 1]
    assert len(kept) == len(pruning)
    for i, patches in zip(pruning, kept, strict=True):
        found[f"block{i}.class_attention (B,N-1)"] = found[f"block{i} attention"][1]
        found[f"block{i}.kept_index (B,K)"] = seen[f"block{i} (B,1+tokens,C)"][1]
        found[f"block{i}.kept_patch (B,K)"] = patches
    for key, recorded in case["outputs"].items():
        if ".kept_" in key:
            assert np.array_equal(found[key].numpy(), _recorded_integers(recorded)), key
        else:
            assert_golden(found[key], recorded, what=key)


@pytest.mark.parametrize(("name", "number"), GRADED, ids=[f"{n.split('/')[1]}-{i}" for n, i in GRADED])
def test_gradients_are_the_authors(golden_model, name, number) -> None:
    case = load_golden(name)["cases"][number]
    norms = gradient_norms(golden_model(name, **_kwargs(case)), image(case["input"], case["seed"]))
    assert norms.keys() == case["grad_norms"].keys()
    for key, recorded in case["grad_norms"].items():
        assert norms[key] == pytest.approx(recorded, rel=1e-3), key


def test_keep_rate_at_run_time_gives_the_golden_of_that_rate(golden_model) -> None:
    name = "evit/evit_small_keep0.7_fuse"
    number = next(i for n, i in CASES if n == name and "arguments" in load_golden(n)["cases"][i])
    case = load_golden(name)["cases"][number]
    model = golden_model(name, **(_kwargs(case) | {"base_keep_rate": 0.7}))
    x = image(case["input"], case["seed"])
    rates = [case["arguments"]["keep_rate"]] * 12
    for setting in (case["arguments"]["keep_rate"], rates):
        model.set_keep_rate(setting)
        with torch.no_grad():
            assert_golden(model(x), case["outputs"]["logits"])
            _, kept = model.forward_features(x, return_kept=True)
        recorded = case["outputs"]["block9.kept_patch (B,K)"]
        assert np.array_equal(kept[2].numpy(), _recorded_integers(recorded))
        model.set_keep_rate(None)
        assert model.keep_rates[3:5] == (0.7, 1.0)


# The whole model once more, plainly: one image, full attention matrices, Python sorting.


def _plain(
    model: nn.Module, image_: Tensor, rates: list[float], tokens: list[int | None], fuse: bool
) -> tuple[Tensor, list[list[int]]]:
    w = model.state_dict()
    heads, head_dim = model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim

    def norm(x: Tensor, key: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], 1e-6)

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    patches = F.conv2d(image_[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = torch.cat([w["cls_token"][0], patches[0].flatten(1).T]) + w["pos_embed"][0]
    names = list(range(len(x) - 1))
    kept = []
    for i, (rate, number) in enumerate(zip(rates, tokens, strict=True)):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(heads * head_dim, -1)
        out, score = [], 0.0
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            attn = (q[:, part] @ k[:, part].T / math.sqrt(head_dim)).softmax(-1)
            out.append(attn @ v[:, part])
            score = score + attn[0, 1:] / heads
        x = x + linear(torch.cat(out, -1), f"blocks.{i}.attn.proj")
        count = math.ceil(rate * (len(x) - 1)) if number is None else number
        if count < len(x) - 1:
            order = sorted(range(len(x) - 1), key=lambda t: -float(score[t]))
            rest = sum(score[t] * x[1 + t] for t in order[count:])
            x = torch.stack([x[0], *(x[1 + t] for t in order[:count]), *([rest] if fuse else [])])
            kept.append([names[t] for t in order[:count]])
            names = kept[-1] + ([-1] if fuse else [])
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[0], "head"), kept


def _tiny(**kwargs: Any) -> nn.Module:
    """Return a filled model of a few small blocks in float64."""
    settings = {"img_size": 80, "depth": 5, "drop_loc": (1, 3), "num_classes": 7, "fuse_token": True} | kwargs
    model = vitzoo.create_model("evit_tiny_patch16_224", **settings).eval()
    table = {k: torch.from_numpy(fill(k, v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(table)
    return model.double()


def _assert_plain(model: nn.Module, rates: list[float], tokens: list[int | None]) -> list[Tensor]:
    x = image((2, 3, 80, 80), 3).double()
    with torch.no_grad():
        logits = model(x)
        _, kept = model.forward_features(x, return_kept=True)
        expected = [_plain(model, one, rates, tokens, model.fuse_token) for one in x]
    assert relative_difference(logits, torch.stack([e[0] for e in expected])) < 1e-10
    for b, (_, names) in enumerate(expected):
        assert [k[b].tolist() for k in kept] == names
    return kept


@pytest.mark.parametrize("fuse", [False, True], ids=["drop", "fuse"])
class TestSettings:
    def test_built_rate(self, fuse) -> None:
        kept = _assert_plain(_tiny(fuse_token=fuse, base_keep_rate=0.4), [1, 0.4, 1, 0.4, 1], [None] * 5)
        assert [k.shape[1] for k in kept] == [10, 5 if fuse else 4]

    def test_one_rate_for_all_prunes_only_the_blocks_built_to(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_rate(0.5)
        assert model.keep_rates == (1, 0.5, 1, 0.5, 1)
        _assert_plain(model, [1, 0.5, 1, 0.5, 1], [None] * 5)

    def test_a_rate_for_each_block(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_rate([0.1, 0.8, 0.1, 0.3, 1])
        _assert_plain(model, [1, 0.8, 1, 0.3, 1], [None] * 5)

    def test_rate_one_is_the_plain_transformer(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_rate(1.0)
        assert _assert_plain(model, [1] * 5, [None] * 5) == []

    def test_one_number_for_all_prunes_in_any_block(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_tokens(6)
        kept = _assert_plain(model, [1] * 5, [6] * 5)
        # without fusion six are left after the first block; with it there are seven to choose from each time
        assert [k.shape[1] for k in kept] == ([6] * 5 if fuse else [6])

    def test_a_number_for_some_blocks(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_tokens([20, None, None, 3, None])
        _assert_plain(model, [1, 0.7, 1, 1, 1], [20, None, None, 3, None])

    def test_the_last_setting_counts(self, fuse) -> None:
        model = _tiny(fuse_token=fuse)
        model.set_keep_tokens(2)
        model.set_keep_rate(0.9)
        _assert_plain(model, [1, 0.9, 1, 0.9, 1], [None] * 5)
        model.set_keep_tokens(2)
        model.set_keep_tokens(None)
        _assert_plain(model, [1, 0.9, 1, 0.9, 1], [None] * 5)


def test_fused_tokens_are_minus_one_and_no_patch_of_the_mask() -> None:
    model = _tiny()
    model.set_keep_tokens([4, 4, 4, 4, 4])  # of four tokens and a fused one
    with torch.no_grad():
        _, kept = model.forward_features(image((4, 3, 80, 80), 1).double(), return_kept=True)
    assert any((k == -1).any() for k in kept[1:])
    masks = torch.stack([patch_mask(k, (5, 5)) for k in kept])
    assert torch.equal(masks.sum((2, 3)), torch.stack([(k >= 0).sum(1) for k in kept]))
    assert not (masks[1:] & ~masks[:-1]).any(), "a patch came back"


def test_a_rate_without_pruning_blocks_warns() -> None:
    model = _tiny(base_keep_rate=1.0)
    with pytest.warns(UserWarning, match="keep rate 0.5 changes nothing: no block was built to prune"):
        model.set_keep_rate(0.5)
    assert _assert_plain(model, [1] * 5, [None] * 5) == []


# Features


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
def test_maps_hold_the_kept_tokens_at_their_patches(norm) -> None:
    model = _tiny(img_size=(64, 112), base_keep_rate=0.5)
    x = image((2, 3, 64, 112)).double()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.no_grad():
        _, kept = model.forward_features(x, return_kept=True)
        raw = [o[0] for o in outputs]
        final, maps = model.forward_intermediates(x, norm=norm)
        torch.testing.assert_close(final, model.forward_features(x))
    stages = [None, kept[0], kept[0], kept[1], kept[1]]
    for tokens, patches, found in zip(raw, stages, maps, strict=True):
        tokens = model.norm(tokens) if norm else tokens
        expected = torch.zeros(2, 192, 28, dtype=torch.float64)
        for b in range(2):
            for t, patch in enumerate(range(28) if patches is None else patches[b].tolist()):
                if patch >= 0:
                    expected[b, :, patch] = tokens[b, 1 + t]
        assert torch.equal(found, expected.view(2, 192, 4, 7))
        assert found.is_contiguous()


def test_other_forms_of_features() -> None:
    model = _tiny()
    x = image((2, 3, 80, 80)).double()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, [1, 4])
        rows = model.forward_intermediates(x, [1, 4], output_fmt="NLC", intermediates_only=True)
        pairs = model.forward_intermediates(x, [1], return_prefix_tokens=True, intermediates_only=True)
        table = model.forward_intermediates(x, [1], return_prefix_tokens=True, output_dict=True)
        early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    for a, b in zip(maps, rows, strict=True):
        assert torch.equal(a, b.transpose(1, 2).reshape(2, 192, 5, 5))
    assert torch.equal(pairs[0][0], maps[0])
    assert torch.equal(early[0], maps[0])
    assert torch.equal(table["image_intermediates_prefix"][0], pairs[0][1])
    assert torch.equal(table["image_features"], final)
    assert pairs[0][1].shape == (2, 1, 192)
    with pytest.raises(ValueError, match="output_fmt 'NHWC' is not one of"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_checkpointing_changes_nothing() -> None:
    model, x = _tiny().train(), image((2, 3, 80, 80)).double()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        tokens, kept = model.forward_features(x, return_kept=True)
        maps = model.forward_intermediates(x, [4], intermediates_only=True)
        (tokens.square().mean() + maps[0].square().mean() + model(x).square().mean()).backward()
        results.append((tokens, kept, maps, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_average_pooling_is_over_the_tokens_left() -> None:
    model = _tiny(global_pool="avg")
    x = image((2, 3, 80, 80)).double()
    with torch.no_grad():
        expected = model.head(model.fc_norm(model.forward_features(x)[:, 1:].mean(1)))
        torch.testing.assert_close(model(x), expected)


# Image sizes


def _positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    grid = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("size", [(160, 160), (128, 208), (112, 448), (448, 112)], ids=str)
def test_every_way_to_another_size_is_the_same(golden_model, size) -> None:
    # 112x448 has as many patches as the table's 224x224
    name = "evit/evit_tiny_keep0.5_nofuse"
    table = golden_state_dict(load_golden(name))["pos_embed"]
    built = golden_model(name, img_size=size)
    resized = golden_model(name)
    resized.set_input_size(size)
    dynamic = golden_model(name, dynamic_img_size=True)
    grid = (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(built.pos_embed.data, _positions(table, (14, 14), grid))
    assert torch.equal(resized.pos_embed, built.pos_embed)
    x = image((1, 3, *size))
    with torch.no_grad():
        expected = built(x)
        assert relative_difference(resized(x), expected) < 1e-6
        assert relative_difference(dynamic(x), expected) < 1e-6
        assert dynamic.forward_intermediates(x, [11], intermediates_only=True)[0].shape[-2:] == grid
    assert resized._traits["img_size"] == size


def test_padding_takes_any_size() -> None:
    padded = _tiny(dynamic_img_size=True, dynamic_img_pad=True)
    x = image((1, 3, 75, 70)).double()
    with torch.no_grad():
        expected = padded(F.pad(x, (0, 10, 0, 5)))
        assert torch.equal(padded(x), expected)
        assert padded.forward_intermediates(x, [4], intermediates_only=True)[0].shape[-2:] == (5, 5)


def test_own_non_square_weights_load_where_their_size_is_said(no_search, tmp_path: Path) -> None:
    model = vitzoo.create_model("evit_tiny_patch16_224", img_size=(96, 128)).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    with pytest.raises(CheckpointError, match="pos_embed has 48 patches, not a square"):
        vitzoo.create_model("evit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    overlay["input_size"] = (3, 96, 128)
    again = vitzoo.create_model("evit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(again.pos_embed, model.pos_embed)
    square = vitzoo.create_model(
        "evit_tiny_patch16_224", pretrained=True, img_size=64, pretrained_cfg_overlay=overlay
    )
    torch.testing.assert_close(square.pos_embed, _positions(model.pos_embed, (6, 8), (4, 4)))


# Checkpoints and tags


def test_the_file_s_average_is_taken_only_when_asked(golden_model) -> None:
    name = "evit/evit_tiny_keep0.5_nofuse"
    weights = golden_state_dict(load_golden(name))
    assert torch.equal(golden_model(name).head.weight, weights["head.weight"])
    assert golden_model(name, use_ema=True).head.weight.abs().max() == 0


def test_distilled_weights_are_refused(no_search, tmp_path: Path) -> None:
    deit = timm.create_model("deit_tiny_distilled_patch16_224")
    torch.save({"model": deit.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="distilled DeiT, EViT has no distillation token"):
        vitzoo.create_model(
            "evit_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")},
        )


def test_plain_deit_weights_give_deit_at_rate_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_patch16_224").eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    model = vitzoo.create_model(
        "evit_tiny_patch16_224.deit_in1k", pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    model.set_keep_rate(1.0)
    x = image((2, 3, 224, 224))
    with torch.no_grad():
        assert relative_difference(model(x), deit(x)) < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["drop", "fuse"])
@pytest.mark.parametrize("rate", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_tags_set_rate_and_fusion(rate, fused) -> None:
    tag = f"evit_small_patch16_224.keep{rate}_{'fuse_' if fused else ''}in1k"
    with torch.device("meta"):
        model = timm.create_model(tag)
        other = timm.create_model(tag, base_keep_rate=0.25)
    assert model.keep_rates == tuple(rate if i in (3, 6, 9) else 1.0 for i in range(12))
    assert {block.fuse_token for block in model.blocks} == {fused}
    assert other.keep_rates[3] == 0.25


def test_default_tags() -> None:
    assert {name: timm.get_pretrained_cfg(name).tag for name in vitzoo.list_models(family="evit")} == {
        "evit_tiny_patch16_224": "deit_in1k",
        "evit_small_patch16_224": "keep0.7_in1k",
        "evit_base_patch16_224": "deit_in1k",
    }
    found = {c.name: c for c in vitzoo.model_info("evit_small_patch16_224").checkpoints}
    assert len(found) == 11
    assert found["evit_small_patch16_224.keep0.5_fuse_in1k"].top1 == 78.5
    assert found["evit_small_patch16_224.deit_in1k"].url.endswith("deit_small_patch16_224-cd65a155.pth")
    assert all(c.get.startswith("https://drive.google.com/file/d/") for c in found.values() if c.get)


# MACs (1e9) counted from the authors' code at 224: matmuls and convolutions
MACS = {
    ("small", 0.7, True): 3.03,
    ("small", 0.7, False): 3.00,
    ("small", 0.5, False): 2.28,
    ("small", 1.0, False): 4.60,
    ("base", 0.6, True): 10.09,
}


@pytest.mark.parametrize("key", MACS, ids=lambda key: "-".join(map(str, key)))
def test_multiply_accumulates_are_the_authors(key) -> None:
    size, rate, fused = key
    with torch.device("meta"):
        model = vitzoo.create_model(f"evit_{size}_patch16_224", base_keep_rate=rate, fuse_token=fused).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(MACS[key], rel=2e-3)


# Tools


def test_traces_with_fx() -> None:
    from timm.models._features_fx import create_feature_extractor

    model, x = _tiny(), image((2, 3, 80, 80)).double()
    graph = create_feature_extractor(model, {"blocks.3.norm2": "middle", "head": "logits"})
    with torch.no_grad():
        out = graph(x)
        assert torch.equal(out["logits"], model(x))
    assert out["middle"].shape[1] < 26


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_at_any_rate(backend) -> None:
    model, x = _tiny(depth=3, drop_loc=(1,)).float(), image((2, 3, 80, 80))

    def everything(x: Tensor) -> tuple[Any, list[Tensor]]:
        return model.forward_features(x, True), model.forward_intermediates(x, [2], intermediates_only=True)

    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    with torch.no_grad():
        for rate in (0.7, 0.5):
            model.set_keep_rate(rate)
            (tokens, kept), maps = everything(x)
            (found, patches), grids = compiled(x)
            assert relative_difference(found, tokens) < 1e-5
            assert torch.equal(patches[0], kept[0])
            assert relative_difference(grids[0], maps[0]) < 1e-5


def test_onnx_with_fusion_maps_and_patches(tmp_path: Path) -> None:
    import onnxruntime

    class Everything(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            tokens, maps = self.model.forward_intermediates(x, [3])
            _, kept = self.model.forward_features(x, return_kept=True)
            return self.model.forward_head(tokens), maps[0], *kept

    model = Everything(_tiny(depth=4).float()).eval()
    torch.onnx.export(
        model,
        (image((2, 3, 80, 80)),),
        tmp_path / "m.onnx",
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        input_names=["x"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = image((count, 3, 80, 80), 5)
        found = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            logits, maps, *kept = model(x)
        assert relative_difference(found[0], logits) < 1e-4
        assert relative_difference(found[1], maps) < 1e-4
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found[2:], kept, strict=True))


# Refusals


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_keep_rates_outside_are_refused(rate) -> None:
    with pytest.raises(ValueError, match=rf"base_keep_rate {rate} is not in \(0, 1\]"):
        vitzoo.create_model("evit_tiny_patch16_224", base_keep_rate=rate)
    model = _tiny()
    for setting in (rate, [0.5, rate, 1, 1, 1]):
        with pytest.raises(ValueError, match=rf"keep rate {rate} is not in \(0, 1\]"):
            model.set_keep_rate(setting)
    assert model.keep_rates == (1, 0.7, 1, 0.7, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_keep_rate([0.5, 0.5]), "2 keep rates were given, the model has 5 blocks"),
        (lambda m: m.set_keep_tokens([3] * 6), "6 token numbers were given, the model has 5 blocks"),
        (lambda m: m.set_keep_tokens(0), "keep tokens 0 is below 1"),
        (lambda m: m.set_input_size(90), "img_size 90 is not a multiple of patch_size 16"),
        (lambda m: m.reset_classifier(3, "max"), "global_pool 'max' is not one of"),
        (lambda m: m(torch.zeros(1, 3, 64, 80).double()), r"64x80, .* set_input_size\(\(64, 80\)\)"),
        (lambda m: m(torch.zeros(1, 1, 80, 80).double()), r"input has shape \(1, 1, 80, 80\), expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(_tiny())


def test_more_tokens_than_there_are_is_refused() -> None:
    model = _tiny()
    model.set_keep_tokens(26)
    with pytest.raises(ValueError, match="keep tokens 26 exceeds the 25 tokens that are left"):
        model(image((1, 3, 80, 80)).double())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"drop_loc": (3, 12)},
            r"names block 12, a model of depth 12 has blocks 0 \.\. 11",
        ),
        ({"drop_loc": (-1,)}, r"drop_loc \(-1,\) names block -1"),
        ({"img_size": 225}, "img_size 225 is not a multiple of patch_size 16"),
        ({"img_size": (224, 100)}, r"img_size \(224, 100\) is not a multiple"),
        ({"global_pool": "map"}, "global_pool 'map' is not one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_bad_arguments_are_refused(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        vitzoo.create_model("evit_tiny_patch16_224", **kwargs)


def test_dynamic_sizes_must_be_multiples() -> None:
    with pytest.raises(ValueError, match="input 72x80 is not a multiple of patch_size 16x16"):
        _tiny(dynamic_img_size=True)(torch.zeros(1, 3, 72, 80).double())


@pytest.mark.parametrize(
    "kwargs",
    [{"class_token": False}, {"reg_tokens": 4}, {"patch_drop_rate": 0.1}, {"pos_embed": "none"}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_options_of_timm_without_a_meaning_here_are_unknown(kwargs) -> None:
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        vitzoo.create_model("evit_tiny_patch16_224", **kwargs)
