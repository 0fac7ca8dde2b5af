"""Inputs of pooled attention: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.pooled_attention.reference import split_heads


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch, height, width: B, H, W.
        key_height, key_width: h, w.
        num_heads, head_dim: C is their product.
    """

    batch: int
    height: int
    width: int
    key_height: int
    key_width: int
    num_heads: int
    head_dim: int


SHAPES: dict[str, Shape] = {
    "one_token": Shape(1, 1, 1, 1, 1, 1, 1),
    "column": Shape(2, 5, 1, 3, 1, 1, 1),
    "one_key": Shape(2, 3, 2, 1, 1, 2, 3),
    "lofi": Shape(2, 6, 8, 3, 4, 2, 8),
    "odd": Shape(3, 5, 7, 3, 3, 3, 5),
    "more_keys": Shape(1, 2, 3, 11, 13, 2, 20),
    "two_blocks": Shape(2, 9, 8, 10, 10, 1, 17),
    "many_keys": Shape(1, 3, 5, 34, 31, 1, 32),
}
# The models' own sizes, for benchmarks: LITv2's stages 3 and 4, its stage 3 at four times the side, PVTv2-B2.
MODEL_SHAPES: dict[str, Shape] = {
    "litv2_small_stage3": Shape(4, 14, 14, 7, 7, 10, 32),
    "litv2_small_stage4": Shape(4, 7, 7, 7, 7, 24, 32),
    "litv2_small_stage3_896": Shape(1, 56, 56, 28, 28, 10, 32),
    "pvt_v2_b2_stage1": Shape(1, 56, 56, 7, 7, 1, 64),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, all of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape.num_heads * shape.head_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return {
        "q": normal(shape.batch, shape.height, shape.width, channels),
        "kv": normal(shape.batch, shape.key_height, shape.key_width, 2 * channels),
        "num_heads": shape.num_heads,
    }


def sdpa_pooled_attention(q: Tensor, kv: Tensor, num_heads: int) -> Tensor:
    """Attend with PyTorch's fused attention."""
    out = F.scaled_dot_product_attention(*split_heads(q, kv, num_heads))
    return out.transpose(1, 2).reshape(q.shape)


BASELINES = {"sdpa": sdpa_pooled_attention}
