"""Selective scan for torch.export: `scan`, PyTorch's higher-order operator, which becomes one ONNX Scan.

Only the recurrence stands in the body; the exporter and ONNX Runtime do the rest in parallel over the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from vitzoo.kernels.selective_scan.reference import compute_dtype, step_size


def _leading_tokens(matrix: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return B or C as (L or 1, B or 1, D or 1, N)."""
    matrix = matrix.to(dtype)
    if matrix.ndim == 2:
        return matrix[None, None]
    if matrix.ndim == 3:
        return matrix.permute(2, 0, 1).unsqueeze(2)
    batch, groups, dstate, seqlen = matrix.shape
    rows = matrix.permute(3, 0, 1, 2).unsqueeze(3).expand(seqlen, batch, groups, dim // groups, dstate)
    return rows.reshape(seqlen, batch, dim, dstate)


def _step(h: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    decay, drive = inputs
    h = decay * h + drive
    return h, h.clone()


def selective_scan_export(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (out, last_state) as `selective_scan_reference` does, in a form that torch.onnx can translate."""
    dtype = compute_dtype(u)
    dim = u.shape[1]
    x = u.to(dtype).permute(2, 0, 1)  # (L, B, D)
    step = step_size(delta, delta_bias, delta_softplus, dtype).permute(2, 0, 1)
    rate = A.to(dtype)
    decay = torch.exp(step.unsqueeze(-1) * rate)  # (L, B, D, N)
    drive = (step * x).unsqueeze(-1) * _leading_tokens(B, dim, dtype)
    start = torch.zeros_like(decay[0])
    last, states = scan(_step, start, (decay, drive), dim=0)
    y = (states * _leading_tokens(C, dim, dtype)).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * x
    y = y.permute(1, 2, 0)  # (B, D, L)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), last
