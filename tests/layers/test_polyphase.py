from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitzoo.layers import polyphase_anchor
from vitzoo.layers.polyphase import check_square, circular_pad_tokens, polyphase_anchor_tokens, square_side
from vitzoo.testing import assert_golden, image, load_golden

GOLDEN = [
    pytest.param(name, case, id=f"{name}-{index}")
    for name in ("anchor_phase2", "anchor_phase4", "anchor_phase7")
    for index, case in enumerate(load_golden(f"polyphase/{name}")["cases"])
]


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("name", "case"), GOLDEN)
def test_anchors_are_the_authors(name: str, case: dict[str, Any]) -> None:
    phase = tuple(load_golden(f"polyphase/{name}")["arguments"]["phase_size"])
    x = image(case["input"], case["seed"]).roll(tuple(case.get("roll", (0, 0))), (2, 3))
    recorded = np.asarray(case["outputs"]["anchors (B,calls,2)"]["values"]).reshape(-1, 2)
    y, anchors = polyphase_anchor(x, phase)
    assert anchors.dtype == torch.int64
    assert anchors.tolist() == recorded.tolist()
    assert_golden(y, case["outputs"]["output"], 1e-8)  # the file rounds its figures
    tokens, again = polyphase_anchor_tokens(_tokens(x), (x.shape[2], x.shape[3]), phase)
    assert torch.equal(tokens, _tokens(y))
    assert torch.equal(again, anchors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("phase", [(1, 1), (2, 3), (4, 2), (8, 12)], ids=str)
def test_each_sample_is_rolled_by_its_strongest_phase(phase: tuple[int, int], dtype: torch.dtype) -> None:
    x = (30 * image((3, 5, 8, 12), 4)).to(dtype)
    y, anchors = polyphase_anchor(x, phase)
    for sample, out, (row, column) in zip(x, y, anchors.tolist(), strict=True):
        norms = [
            float(sample[:, r :: phase[0], c :: phase[1]].double().norm())
            for r in range(phase[0])
            for c in range(phase[1])
        ]
        assert row * phase[1] + column == int(np.argmax(norms))
        assert torch.equal(out, sample.roll((-row, -column), (1, 2)))


def test_float16_norms_do_not_overflow() -> None:
    x = torch.full((1, 8, 4, 4), 200.0, dtype=torch.float16)
    x[:, :, 1::2, 0::2] = 300.0  # squares of both are beyond float16
    assert polyphase_anchor(x, (2, 2))[1].tolist() == [[1, 0]]


@pytest.mark.parametrize("anchor", ["map", "tokens"])
def test_first_phase_wins_ties(anchor: str) -> None:
    x = torch.zeros(2, 3, 4, 4)
    x[1, :, 0, 1] = x[1, :, 1, 0] = -2.0
    if anchor == "map":
        anchors = polyphase_anchor(x, (2, 2))[1]
    else:
        anchors = polyphase_anchor_tokens(_tokens(x), (4, 4), (2, 2))[1]
    assert anchors.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_shifted_maps_differ_by_whole_phases(seed: int) -> None:
    x = image((1, 4, 24, 24), seed)
    shift = tuple(np.random.RandomState(seed).randint(0, 24, 2).tolist())
    y, z = polyphase_anchor(x, (4, 4))[0], polyphase_anchor(x.roll(shift, (2, 3)), (4, 4))[0]
    rolls = [(r, c) for r in range(0, 24, 4) for c in range(0, 24, 4)]
    assert sum(torch.equal(y.roll(roll, (2, 3)), z) for roll in rolls) == 1


def test_gradient_is_the_opposite_roll() -> None:
    x = image((2, 3, 8, 8), 1).requires_grad_()
    y, anchors = polyphase_anchor(x, (4, 4))
    dout = image((2, 3, 8, 8), 2)
    (dx,) = torch.autograd.grad(y, x, dout)
    expected = torch.stack([d.roll(tuple(a), (1, 2)) for d, a in zip(dout, anchors.tolist(), strict=True)])
    assert torch.equal(dx, expected)
    tokens = _tokens(x)
    z, _ = polyphase_anchor_tokens(tokens, (8, 8), (4, 4))
    (dx,) = torch.autograd.grad(z, x, _tokens(dout))
    assert torch.equal(dx, expected)


def test_circular_padding_is_torchs() -> None:
    x = image((2, 3, 4, 6), 0)
    expected = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    assert torch.equal(circular_pad_tokens(_tokens(x), (4, 6)), expected)


def test_compiles_whole() -> None:
    x = image((2, 3, 8, 8), 5)
    compiled = torch.compile(polyphase_anchor, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x, (4, 4)), polyphase_anchor(x, (4, 4)), strict=True):
        assert torch.equal(ours, expected)


def test_sizes_that_the_phase_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="a map of 8x9 is not divisible by the phase size 4x4"):
        polyphase_anchor(torch.zeros(1, 1, 8, 9), (4, 4))
    with pytest.raises(ValueError, match="a map of 8x8 is not divisible by the phase size 3x4"):
        polyphase_anchor_tokens(torch.zeros(1, 64, 1), (8, 8), (3, 4))
    with pytest.raises(ValueError, match="not divisible by the phase size 0x4"):
        polyphase_anchor(torch.zeros(1, 1, 8, 8), (0, 4))
    with pytest.raises(ValueError, match="input 8x16 is not a square whose side is a multiple of 8"):
        check_square((8, 16), 8, "input")
    with pytest.raises(ValueError, match="50 tokens are no square map"):
        square_side(torch.zeros(1, 50, 1))
