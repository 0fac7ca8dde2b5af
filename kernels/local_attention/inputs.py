"""Inputs of local_attention: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        channels: C.
        height: H.
        width: W.
        kernel_size: of the window.
        dilation: between window positions.
        num_heads: groups of channels.
    """

    batch: int
    channels: int
    height: int
    width: int
    kernel_size: int | tuple[int, int] = 3
    dilation: int = 1
    num_heads: int = 1


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 1, 1, 1),
    "one_row": Shape(2, 4, 1, 7),
    "odd": Shape(3, 10, 7, 19, num_heads=2),
    "wide_kernel": Shape(1, 6, 9, 11, kernel_size=7, num_heads=3),
    "column": Shape(2, 5, 13, 6, kernel_size=(5, 1)),
    "dilated": Shape(1, 8, 10, 9, dilation=3, num_heads=2),
    "depthwise": Shape(2, 6, 8, 8, kernel_size=(1, 3), num_heads=6),
    "beyond_the_map": Shape(1, 4, 3, 2, kernel_size=5, dilation=2),
    "many_rows": Shape(1, 2, 19, 34, kernel_size=5),
    "pointwise": Shape(2, 3, 4, 5, kernel_size=1),
}
# TiC names no sizes; these are the stages of its proposal at 224 (see the model) with heads of 32 channels.
MODEL_SHAPES: dict[str, Shape] = {
    "tic_stage1": Shape(8, 64, 56, 56, num_heads=2),
    "tic_stage3": Shape(8, 256, 14, 14, kernel_size=5, num_heads=8),
    "tic_stage1_one_head": Shape(8, 64, 56, 56),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call.

    Args:
        shape: sizes and options.
        dtype: of q, k and v.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.channels, shape.height, shape.width)
    tensors = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for name in "qkv"
    }
    options = {"kernel_size": shape.kernel_size, "dilation": shape.dilation, "num_heads": shape.num_heads}
    return tensors | options | {"scale": (shape.channels // shape.num_heads) ** -0.5}


def unfold_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int = 1,
    scale: float = 1.0,
    num_heads: int = 1,
) -> Tensor:
    """Return the same attention by the paper's formulation: windows unfolded to (B, C kh kw, H W)."""
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    padding = (dilation * (kh - 1) // 2, dilation * (kw - 1) // 2)
    batch, channels, height, width = q.shape
    parts = (batch, num_heads, channels // num_heads)
    query = q.reshape(*parts, 1, height * width)
    keys, values = (
        F.unfold(x, (kh, kw), dilation, padding).reshape(*parts, kh * kw, height * width) for x in (k, v)
    )
    attn = ((query * keys).sum(2, keepdim=True) * scale).softmax(3)
    return (attn * values).sum(3).reshape(q.shape)


# What the speed of the operator is measured against.
BASELINES: dict[str, Callable[..., Tensor]] = {"unfold formulation": unfold_attention}
