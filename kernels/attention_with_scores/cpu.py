"""Attention with the class token's scores on the CPU in C++."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.attention import cpu as attention
from vitzoo.kernels.common.attention.reference import compute_dtype

why_not = attention.why_not


def _rows(q: Tensor) -> Tensor:
    """Return (B, heads, L, head_dim), uninitialised, a view of (B, L, heads, head_dim)."""
    batch, heads, length, head_dim = q.shape
    return torch.empty((batch, length, heads, head_dim), dtype=q.dtype).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out, (B, L, heads, head_dim), and scores, (B, L - 1)."""
    out = _rows(q)
    first_rows = torch.empty(q.shape[:3], dtype=compute_dtype(q))
    attention.forward(q, k, v, scale, out, first_rows)
    return out.transpose(1, 2), first_rows[:, :, 1:].mean(dim=1)


def backward(
    dout: Tensor, dscores: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dfirst_row = None
    if dscores is not None:
        dfirst_row = F.pad(dscores.to(compute_dtype(q)) / q.shape[1], (1, 0))
    gradients = (_rows(q), _rows(q), _rows(q))
    attention.backward(dout.transpose(1, 2), dfirst_row, q, k, v, scale, *gradients)
    return gradients
