"""Residual addition and normalisation in plain PyTorch: the definition.

Legend: C channels, the last axis; the others are any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream and of sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(x.dtype, torch.float32)


def _added(x: Tensor, residual: Tensor | None) -> Tensor:
    wide = x.to(compute_dtype(x))
    return wide if residual is None else wide + residual.to(wide.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (out, residual_out): r = x + residual, r / sqrt(mean(r^2) + eps) * weight; see `add_rms_norm`."""
    r = _added(x, residual)
    return F.rms_norm(r, weight.shape, weight.to(r.dtype), eps).to(x.dtype), r


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return (out, residual_out): r = x + residual, (r - mean) / sqrt(var + eps) * weight + bias."""
    r = _added(x, residual)
    b = None if bias is None else bias.to(r.dtype)
    return F.layer_norm(r, weight.shape, weight.to(r.dtype), b, eps).to(x.dtype), r
