"""Bidirectional selective scan by flips, two scans and a sum: the definition (Vim, arXiv 2401.09417, Algorithm 1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.selective_scan import selective_scan


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of state and sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(u.dtype, torch.float32)


def flipped(matrix: Tensor) -> Tensor:
    """Return B or C from the last token to the first; a constant one, (D, N), as it is."""
    return matrix if matrix.ndim == 2 else matrix.flip(-1)


def gated(y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return y silu(z), or y without a gate, in `dtype`."""
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(dtype)


def two_scans(
    u: Tensor,
    z: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    u_b: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Return (scan(u) + flip(scan(flip(u_b)))) silu(z), the scans by the public operator."""
    wide = u.to(compute_dtype(u))
    wide_b = (u if u_b is None else u_b).to(wide.dtype).flip(-1)
    ahead = cast(Tensor, selective_scan(wide, delta, A, B, C, D, None, delta_bias, delta_softplus))
    back = cast(
        Tensor,
        selective_scan(
            wide_b,
            delta_b.flip(-1),
            A_b,
            flipped(B_b),
            flipped(C_b),
            D_b,
            None,
            delta_bias_b,
            delta_softplus,
        ),
    )
    return gated(ahead + back.flip(-1), z, u.dtype)


def bidirectional_selective_scan_reference(
    u: Tensor,
    z: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    u_b: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Return the gated sum (B, D, L); see `vitzoo.kernels.bidirectional_selective_scan` for shapes."""
    with use_backend("reference"):
        return two_scans(
            u,
            z,
            delta,
            A,
            B,
            C,
            D,
            delta_bias,
            delta_b,
            A_b,
            B_b,
            C_b,
            D_b,
            delta_bias_b,
            u_b,
            delta_softplus,
        )
