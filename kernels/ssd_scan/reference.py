"""The scan of Mamba-2 in plain PyTorch: the definition (arXiv 2405.21060, equation 2 with a scalar A a head).

Legend: B batch, L tokens, P headdim, N state size, G groups of heads that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.linear_scan import (
    chunked_linear_scan,
    compute_dtype,
    per_head,
    recurrent_linear_scan,
)


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Return the step (B, L, heads) in `dtype`: dt, plus its bias, through softplus."""
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    return F.softplus(step) if dt_softplus else step


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        skip = D.to(y.dtype)
        y = y + (skip if skip.ndim == 2 else skip[:, None]) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (out, final_states); see `vitzoo.kernels.ssd_scan` for shapes.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t;  out = y silu(z).
    """
    dtype, heads = compute_dtype(x), x.shape[2]
    step = step_size(dt, dt_bias, dt_softplus, dtype)
    c, b = per_head(C.to(dtype), heads), per_head(B.to(dtype), heads)
    drive = step.unsqueeze(-1) * x.to(dtype)
    y, state = recurrent_linear_scan(c, b, drive, torch.exp(step * A.to(dtype)), None)
    return _finish(y, x, D, z), state.transpose(-1, -2)


def ssd_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return the same by matrix products over chunks: the form that is exported, and a baseline of the benchmark."""
    dtype, heads = compute_dtype(x), x.shape[2]
    step = step_size(dt, dt_bias, dt_softplus, dtype)
    c, b = per_head(C.to(dtype), heads), per_head(B.to(dtype), heads)
    drive = step.unsqueeze(-1) * x.to(dtype)
    y, state = chunked_linear_scan(c, b, drive, step * A.to(dtype), None, chunk)
    return _finish(y, x, D, z), state.transpose(-1, -2)
