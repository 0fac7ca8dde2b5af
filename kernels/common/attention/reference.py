"""Attention in plain PyTorch, the matrix formed."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products and softmax: float32, float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v and the softmax itself.

    Args:
        q: queries, (B, heads, L, head_dim).
        k: keys, (B, heads, keys, head_dim).
        v: values, likewise.
        scale: factor of the products.

    Returns:
        (B, heads, L, head_dim) in the dtype of q, and (B, heads, L, keys) in the compute dtype.
    """
    dtype = compute_dtype(q)
    attn = ((q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)).softmax(dim=-1)
    return (attn @ v.to(dtype)).to(q.dtype), attn
