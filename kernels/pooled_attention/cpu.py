"""Pooled attention on the CPU in C++, which reads the maps as rows of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.common.attention import cpu as attention
from vitzoo.kernels.pooled_attention.reference import split_heads

why_not = attention.why_not


def forward(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Return the attention's output, (B, H, W, C)."""
    out = torch.empty(q.shape, dtype=q.dtype)
    attention.forward_of_maps(q, kv, num_heads, scale, out)
    return out


def backward(dout: Tensor, q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and kv."""
    dq, dkv = torch.empty(q.shape, dtype=q.dtype), torch.empty(kv.shape, dtype=kv.dtype)
    rows = split_heads(dout, kv, num_heads)[0]
    attention.backward(rows, None, *split_heads(q, kv, num_heads), scale, *split_heads(dq, dkv, num_heads))
    return dq, dkv
