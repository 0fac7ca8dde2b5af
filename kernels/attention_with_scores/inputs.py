"""Inputs of attention with scores: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: B.
        num_heads: heads.
        length: L, the class token included.
        head_dim: head_dim.
    """

    batch: int
    num_heads: int
    length: int
    head_dim: int


SHAPES: dict[str, Shape] = {
    "class_token_alone": Shape(2, 2, 1, 3),
    "two_tokens": Shape(1, 1, 2, 1),
    "odd": Shape(3, 3, 17, 5),
    "two_blocks": Shape(2, 2, 101, 24),
    "long": Shape(1, 1, 1100, 32),
}
# The models' own sizes, for benchmarks: EViT-S before, between and after its pruning blocks at keep rate 0.7, and
# EViT-B.
MODEL_SHAPES: dict[str, Shape] = {
    "evit_small": Shape(4, 6, 197, 64),
    "evit_small_pruned": Shape(4, 6, 98, 64),
    "evit_base": Shape(1, 12, 197, 64),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, all of `dtype`: views of one projection, as a ViT's layer has them."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.length, 3, shape.num_heads, shape.head_dim)
    qkv = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4).unbind(0), strict=True))


def matrix_attention_with_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend as the authors' code does, with the matrix formed in the dtype of q."""
    attn = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn @ v, attn[:, :, 0, 1:].mean(dim=1)


def sdpa_attention_with_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with PyTorch's fused attention, and form the class token's row once more."""
    row = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return F.scaled_dot_product_attention(q, k, v), row[:, :, 0, 1:].mean(dim=1)


BASELINES = {"matrix": matrix_attention_with_scores, "sdpa": sdpa_attention_with_scores}
