from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from torch import Tensor

from vitzoo import use_backend
from vitzoo.kernels.reorganize_tokens import reorganize_tokens
from vitzoo.layers.token import (
    ScoredAttention,
    attention_with_scores,
    class_attention,
    keep_count,
    patch_mask,
    prune_tokens,
    scatter_tokens,
    track_patches,
)
from vitzoo.testing import image, relative_difference

SHAPES = {"one head": (1, 1, 5, 8), "odd": (3, 3, 17, 12), "DeiT-S": (2, 6, 197, 64)}


def _qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(image(shape, seed).to(dtype) for seed in range(3))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    attn = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    return attn @ v, attn[:, :, 0, 1:].mean(1)


def _reorganized(x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """One image after another, one token after another."""
    rows, kept = [], []
    for tokens, values in zip(x, scores, strict=True):
        order = sorted(range(len(values)), key=lambda i: -float(values[i]))
        row = [tokens[0], *(tokens[1 + i] for i in order[:keep])]
        if fuse and keep < len(order):
            row.append(sum(values[i] * tokens[1 + i] for i in order[keep:]))
        rows.append(torch.stack(row))
        kept.append(order[:keep])
    return torch.stack(rows), torch.tensor(kept)


@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "scale 0.3"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_with_scores_is_softmax_attention(shape, scale) -> None:
    q, k, v = _qkv(shape)
    out, scores = attention_with_scores(q, k, v, scale)
    expected = _attention(q, k, v, scale or shape[-1] ** -0.5)
    torch.testing.assert_close((out, scores), expected)
    assert scores.sum(1).max() < 1


def test_scores_are_taken_before_dropout() -> None:
    q, k, v = _qkv((2, 3, 50, 16))
    torch.manual_seed(0)
    out, scores = attention_with_scores(q, k, v, dropout_p=0.5)
    expected = _attention(q, k, v, 0.25)
    torch.testing.assert_close(scores, expected[1])
    assert relative_difference(out, expected[0]) > 0.3


def test_scores_of_half_precision_are_float32() -> None:
    q, k, _ = _qkv((2, 6, 197, 64), torch.bfloat16)
    scores = class_attention(q, k)
    assert scores.dtype == torch.float32
    assert relative_difference(scores, class_attention(q.double(), k.double())) < 1e-2


def test_attention_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv((2, 2, 5, 3)))
    assert torch.autograd.gradcheck(attention_with_scores, (q, k, v))


@pytest.mark.parametrize("fuse", [False, True], ids=["drop", "fuse"])
@pytest.mark.parametrize(
    ("length", "keep"), [(2, 1), (9, 1), (9, 5), (9, 8), (197, 138)], ids=lambda n: str(n)
)
def test_reorganize_tokens_is_a_sort(length, keep, fuse) -> None:
    x, scores = image((3, length, 4)).double(), image((3, length - 1), 1).double().sigmoid()
    tokens, index = reorganize_tokens(x, scores, keep, fuse)
    expected = _reorganized(x, scores, keep, fuse)
    torch.testing.assert_close((tokens, index), expected)
    assert tokens.shape[1] == 1 + keep + (fuse and keep < length - 1)


def test_reorganize_tokens_takes_strided_input() -> None:
    x, scores = image((4, 9, 3)).transpose(0, 2), image((3, 8), 1)
    tokens, index = reorganize_tokens(x, scores, 3, True)
    expected = _reorganized(x.contiguous(), scores, 3, True)
    torch.testing.assert_close((tokens, index), expected)


@pytest.mark.parametrize("fuse", [False, True], ids=["drop", "fuse"])
def test_reorganize_gradients(fuse) -> None:
    x = image((2, 7, 3)).double().requires_grad_()
    scores = image((2, 6), 1).double().sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, s: reorganize_tokens(x, s, 4, fuse)[0], (x, scores) if fuse else (x, scores.detach())
    )


def test_reorganize_keeps_half_precision() -> None:
    x, scores = image((2, 197, 16)).bfloat16(), image((2, 196), 1).softmax(1)
    tokens, _ = reorganize_tokens(x, scores, 138, True)
    expected, _ = _reorganized(x.double(), scores.double(), 138, True)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens[:, :-1].double(), expected[:, :-1])
    assert relative_difference(tokens[:, -1], expected[:, -1]) < 4e-3


@pytest.mark.parametrize("keep", [0, -1, 9])
def test_reorganize_refuses(keep) -> None:
    with pytest.raises(ValueError, match=rf"keep {keep} is not in 1 \.\. 8"):
        reorganize_tokens(image((1, 9, 2)), image((1, 8)), keep)


def test_reorganize_refuses_scores_of_another_length() -> None:
    with pytest.raises(ValueError, match="scores have 9 entries, 8 tokens"):
        reorganize_tokens(image((1, 9, 2)), image((1, 9)), 3)


@pytest.mark.parametrize(
    ("rate", "count", "kept"),
    [
        (0.7, 196, 138),
        (0.5, 99, 50),
        (0.7, 10, 7),
        (1.0, 7, 7),
        (1e-9, 7, 1),
        (0.55, 100, 56),
        (0.07, 100, 8),
    ],
)
def test_keep_count_rounds_the_double_up(rate, count, kept) -> None:
    # 0.55 * 100 is 55.00000000000001 in double precision
    assert keep_count(rate, count) == kept


def test_prune_tokens_without_anything_to_drop_returns_its_input() -> None:
    x, scores = image((2, 4, 3)), image((2, 3))
    for rate, tokens in ((0.7, None), (0.1, 3)):  # 0.7 * 3 rounds up to 3
        same, index = prune_tokens(x, scores, rate, tokens, True)
        assert same is x
        assert index is None


def test_prune_tokens_prefers_the_number_to_the_rate() -> None:
    x, scores = image((2, 9, 3)), image((2, 8), 1)
    torch.testing.assert_close(
        prune_tokens(x, scores, 0.9, 2, True), reorganize_tokens(x, scores, 2, True), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="keep tokens 9 exceeds the 8 tokens that are left"):
        prune_tokens(x, scores, 0.9, 9, False)


def test_patches_are_followed_through_two_stages() -> None:
    first = track_patches(None, torch.tensor([[5, 0, 3, 2]]), fused=True)
    assert first.tolist() == [[5, 0, 3, 2, -1]]
    second = track_patches(first, torch.tensor([[4, 1, 0]]), fused=True)
    assert second.tolist() == [[-1, 0, 5, -1]]
    assert track_patches(second, torch.tensor([[2]]), fused=False).tolist() == [[5]]
    assert patch_mask(second, (2, 3)).tolist() == [[[True, False, False], [False, False, True]]]


def test_scatter_puts_tokens_at_their_patches() -> None:
    tokens = image((2, 4, 3)).double().requires_grad_()
    patches = torch.tensor([[5, -1, 0, -1], [1, 2, 3, -1]])
    grid = scatter_tokens(tokens, patches, 6)
    expected = torch.zeros(2, 6, 3, dtype=torch.float64)
    for b, row in enumerate(patches.tolist()):
        for t, patch in enumerate(row):
            if patch >= 0:
                expected[b, patch] = tokens[b, t].detach()
    assert torch.equal(grid, expected)
    assert scatter_tokens(tokens, None, 4) is tokens
    assert torch.autograd.gradcheck(lambda t: scatter_tokens(t, patches, 6), tokens)


@pytest.mark.parametrize("backend", [None, "reference"], ids=["default", "reference"])
def test_scored_attention_is_timms_attention(backend) -> None:
    torch.manual_seed(0)
    plain = Attention(24, num_heads=3, qkv_bias=True).double()
    scored = ScoredAttention(24, num_heads=3, qkv_bias=True).double()
    scored.load_state_dict(plain.state_dict())
    x = image((2, 9, 24)).double()
    with use_backend(backend):
        out, scores = scored(x, return_scores=True)
    torch.testing.assert_close(out, plain(x))
    torch.testing.assert_close(scored(x), plain(x))
    q, k, v = plain.qkv(x).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    torch.testing.assert_close(scores, _attention(q, k, v, 8**-0.5)[1])
