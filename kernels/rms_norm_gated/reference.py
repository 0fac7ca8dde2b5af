"""RMS norm with a gate in plain PyTorch: the definition. C is the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm_gated_reference(
    x: Tensor, weight: Tensor, z: Tensor | None = None, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    """Return rmsnorm(x silu(z)) weight, or rmsnorm(x) weight silu(z) with `norm_before_gate`."""
    dtype = compute_dtype(x)
    y, w = x.to(dtype), weight.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = F.rms_norm(y, weight.shape, w, eps)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
