from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitzoo import use_backend
from vitzoo.layers import HiLo
from vitzoo.testing import (
    assert_golden,
    golden_names,
    golden_state_dict,
    image,
    load_golden,
    relative_difference,
)

CASES = [
    pytest.param(name, i, id=f"{name.split('/')[1]}-{i}")
    for name in golden_names("hilo")
    for i in range(len(load_golden(name)["cases"]))
]


def _layer(golden: dict[str, Any]) -> HiLo:
    layer = HiLo(**golden["arguments"]).eval()
    layer.load_state_dict(golden_state_dict(golden))
    return layer


def _random(dim: int = 48, num_heads: int = 6, **kwargs: Any) -> HiLo:
    torch.manual_seed(0)
    return HiLo(dim, num_heads, **kwargs).eval()


@pytest.mark.parametrize(("name", "index"), CASES)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["default", "reference"])
def test_hilo_golden(name: str, index: int, backend: str | None) -> None:
    with use_backend(backend):
        _compare_with_golden(name, index)


def _compare_with_golden(name: str, index: int) -> None:
    golden = load_golden(name)
    case = golden["cases"][index]
    layer = _layer(golden)
    height, width = (case["H"], case["W"])
    x = image(case["input"], case["seed"])
    outputs = {"output": layer(x, (height, width))}
    if layer.h_heads:
        outputs["hifi"] = layer.hifi(x.unflatten(1, (height, width)))
    if layer.l_heads:
        outputs["lofi"] = layer.lofi(x.unflatten(1, (height, width)))
    for what, recorded in case["outputs"].items():
        assert_golden(outputs[what.split()[0]], recorded, 1e-5, what)
    for key, norm in case.get("grad_norms", {}).items():
        layer.zero_grad()
        out = layer(x, (height, width))
        (out * image(out.shape, 7)).sum().backward()
        ours = float(layer.get_parameter(key).grad.double().norm())
        assert ours == pytest.approx(norm, rel=1e-3), key
    assert sum(p.numel() for p in layer.parameters()) == golden["params"]


def _plain(layer: HiLo, x: Tensor) -> Tensor:
    """HiLo written with loops over heads and windows, for maps that the window divides."""
    s, d = layer.window_size, layer.head_dim
    _, height, width, _ = x.shape
    parts = []
    for h in range(layer.h_heads):
        out = x.new_zeros(*x.shape[:3], d)
        q, k, v = (layer.h_qkv(x)[..., i * layer.h_dim + h * d :][..., :d] for i in range(3))
        for i in range(0, height, s):
            for j in range(0, width, s):
                window = (slice(None), slice(i, i + s), slice(j, j + s))
                a, b, c = (t[window].reshape(len(x), s * s, d) for t in (q, k, v))
                weights = torch.softmax(a @ b.mT / d**0.5, dim=-1)
                out[window] = (weights @ c).reshape(len(x), s, s, d)
        parts.append(out)
    result = [layer.h_proj(torch.cat(parts, -1))] if parts else []
    pooled = x.reshape(len(x), height // s, s, width // s, s, -1).mean((2, 4)).flatten(1, 2)
    parts = []
    for h in range(layer.l_heads):
        q = layer.l_q(x).flatten(1, 2)[..., h * d : (h + 1) * d]
        k, v = (layer.l_kv(pooled)[..., i * layer.l_dim + h * d :][..., :d] for i in range(2))
        parts.append(torch.softmax(q @ k.mT / d**0.5, dim=-1) @ v)
    if parts:
        result.append(layer.l_proj(torch.cat(parts, -1)).unflatten(1, (height, width)))
    return torch.cat(result, -1)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1], ids=lambda a: f"alpha{a}")
@pytest.mark.parametrize(
    ("window", "size"), [(1, (3, 5)), (2, (4, 6)), (3, (6, 3))], ids=["ws1", "ws2", "ws3"]
)
def test_hilo_equals_loops_over_heads_and_windows(alpha: float, window: int, size: tuple[int, int]) -> None:
    layer = _random(window_size=window, alpha=alpha, qkv_bias=True).double()
    x = image((2, *size, 48), 3).double()
    assert relative_difference(layer(x.flatten(1, 2), size).unflatten(1, size), _plain(layer, x)) < 1e-12


@pytest.mark.parametrize("size", [(5, 7), (4, 7), (5, 8)], ids=str)
def test_padding_is_zeros_right_and_bottom_then_a_crop(size: tuple[int, int]) -> None:
    layer = _random(window_size=4, alpha=0.5, qkv_bias=True).double()
    x = image((2, *size, 48), 3).double()
    padded = x.new_zeros(2, -(-size[0] // 4) * 4, -(-size[1] // 4) * 4, 48)
    padded[:, : size[0], : size[1]] = x
    expected = _plain(layer, padded)[:, : size[0], : size[1]]
    assert relative_difference(layer(x.flatten(1, 2), size).unflatten(1, size), expected) < 1e-12
    assert relative_difference(layer.hifi(x), expected[..., : layer.h_dim]) < 1e-12
    assert relative_difference(layer.lofi(x), expected[..., layer.h_dim :]) < 1e-12


@pytest.mark.parametrize(
    ("alpha", "lofi"), [(0, 0), (0.2, 2), (0.4, 4), (0.5, 6), (0.7, 8), (0.9, 10), (1, 12)], ids=str
)
def test_alpha_shares_out_twelve_heads_as_published(alpha: float, lofi: int) -> None:
    layer = HiLo(48, 12, alpha=alpha, device="meta")
    assert (layer.l_heads, layer.h_heads) == (lofi, 12 - lofi)
    assert hasattr(layer, "l_q") == bool(lofi)
    assert hasattr(layer, "h_qkv") == (lofi < 12)


def test_hilo_compiles_whole() -> None:
    layer = _random()
    x = image((2, 35, 48))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_difference(compiled(x, (5, 7)), layer(x, (5, 7))) < 1e-6


def test_hilo_bfloat16() -> None:
    layer = _random()
    x = image((2, 35, 48))
    expected = layer(x, (5, 7))
    assert relative_difference(layer.bfloat16()(x.bfloat16(), (5, 7)), expected) < 2e-2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 50}, "dim 50 is not a multiple of num_heads 8"),
        ({"dim": 64, "window_size": 0}, "window_size 0 is below 1"),
        ({"dim": 64, "alpha": 1.5}, "alpha 1.5 is not a share of heads"),
    ],
    ids=["heads", "window", "alpha"],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiLo(**kwargs)


def test_size_must_be_that_of_the_tokens() -> None:
    with pytest.raises(ValueError, match=r"x has 35 tokens, a 5x8 map has 40"):
        _random()(image((1, 35, 48)), (5, 8))


def test_a_branch_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hi-Fi heads: alpha is 1"):
        _random(alpha=1).hifi(image((1, 4, 4, 48)))
    with pytest.raises(ValueError, match="no Lo-Fi heads: alpha 0 of 6 heads"):
        _random(alpha=0).lofi(image((1, 4, 4, 48)))
