"""Selective scan with complex rates, in torch operations: S4's form, which mamba keeps and no vision model uses.

It has no faster backend. Shapes are those of `vitzoo.kernels.selective_scan`, except that B and C of a token hold real
and imaginary parts in turn along the tokens, (..., N, 2 L), and constant ones are complex, (D, N).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.selective_scan.reference import compute_dtype, per_channel, scan_states, step_size


def _complex(matrix: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return B or C as complex (B or 1, D, L or 1, N)."""
    if matrix.ndim > 2:
        matrix = torch.view_as_complex(matrix.to(dtype).unflatten(-1, (-1, 2)).contiguous())
    return per_channel(matrix, dim, dtype.to_complex())


def complex_selective_scan(
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
    """Return (out, last_state): y_t = 2 Re(sum_n C_t h_t) + D u_t with the recurrence of the real scan.

    Args:
        u: input, (B, D, L), real; delta and z likewise.
        delta: step size before bias and softplus.
        A: rates, (D, N), complex.
        B: (B, N, 2 L), (B, G, N, 2 L) real, or (D, N) complex.
        C: in any of the forms of B.
        D: skip weight, (D,).
        z: gate before silu.
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to delta.

    Returns:
        out, (B, D, L), dtype of u; the state, (B, D, N), complex.

    Source: state-spaces/mamba e9594ce1, selective_scan_ref.
    """
    dtype = compute_dtype(u)
    x, step = u.to(dtype), step_size(delta, delta_bias, delta_softplus, dtype)
    dim = u.shape[1]
    b, c = _complex(B, dim, dtype), _complex(C, dim, dtype)
    decay = torch.exp(step.unsqueeze(-1) * A.to(dtype.to_complex())[:, None, :])
    h = torch.stack(scan_states(decay, (step * x).unsqueeze(-1) * b), dim=2)  # (B, D, L, N)
    y = 2 * (h * c).sum(-1).real
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h[:, :, -1]
