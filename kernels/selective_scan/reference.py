"""Selective scan in plain PyTorch: the definition (Mamba, arXiv 2312.00752, equations 2 and 3, Algorithm 2).

Legend: B batch, D channels, L tokens, N state size, G groups of channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_reference(
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
    """Return (out, last_state); see `vitzoo.kernels.selective_scan` for shapes.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = sum_n C_t h_t + D u_t;  out = y silu(z).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    batch, dim, seqlen = u.shape

    def per_channel(matrix: Tensor) -> Tensor:  # -> (B or 1, D, N, L or 1)
        matrix = matrix.to(dtype)
        if matrix.ndim == 2:
            return matrix[None, :, :, None]
        if matrix.ndim == 3:
            matrix = matrix[:, None]
        return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)

    b, c = per_channel(B), per_channel(C)
    decay = torch.exp(step.unsqueeze(-1) * A.to(dtype)[:, None, :])  # (B, D, L, N)
    drive = (step * x).unsqueeze(-1) * b.transpose(2, 3)  # (B, D, L, N)
    h = u.new_zeros((batch, dim, A.shape[1]), dtype=dtype)
    outputs = []
    for t in range(seqlen):
        h = decay[:, :, t] * h + drive[:, :, t]
        outputs.append((h * c[..., t if c.shape[-1] > 1 else 0]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else x
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h
