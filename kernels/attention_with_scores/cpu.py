"""Attention with the class token's scores on the CPU in C++."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.attention import cpu as attention
from vitzoo.kernels.common.attention.reference import compute_dtype

why_not = attention.why_not


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out, (B, L, heads, head_dim), and scores, (B, L - 1)."""
    batch, heads, length, head_dim = q.shape
    dtype = compute_dtype(q)
    out = torch.empty((batch, length, heads, head_dim), dtype=q.dtype)
    first_rows = torch.empty((batch, heads, length), dtype=dtype)
    scores = torch.empty((batch, length - 1), dtype=dtype)
    attention.forward_with_scores(q, k, v, scale, out.transpose(1, 2), first_rows, scores)
    return out, scores


def backward(
    dout: Tensor, dscores: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dfirst_row = None
    if dscores is not None:
        dfirst_row = F.pad(dscores.to(compute_dtype(q)) / q.shape[1], (1, 0))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    attention.backward(dout.transpose(1, 2), dfirst_row, q, k, v, scale, dq, dk, dv)
    return dq, dk, dv
