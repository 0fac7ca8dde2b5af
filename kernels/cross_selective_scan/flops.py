"""How many floating-point operations a four-direction selective scan takes; see selective_scan/flops.py."""

from __future__ import annotations

from typing import Any

from vitzoo.kernels.selective_scan import selective_scan_bwd_flops, selective_scan_flops


def cross_selective_scan_flops(
    batch: int, dim: int, seqlen: int, dstate: int, *, convention: str = "exact", **options: Any
) -> int:
    """Return the FLOPs (not MACs) of the forward pass: four scans and the three additions of their sum.

    Args:
        batch: B.
        dim: D, channels of one route.
        seqlen: H * W.
        dstate: N.
        convention: "exact" or "paper" (9 a state and pixel, no sum), as in `selective_scan_flops`.
        options: has_D, has_delta_bias and delta_softplus, likewise.

    Raises:
        ValueError: an unknown convention.
    """
    scans = selective_scan_flops(batch, 4 * dim, seqlen, dstate, convention=convention, **options)
    return scans if convention == "paper" else scans + 3 * batch * dim * seqlen


def cross_selective_scan_bwd_flops(batch: int, dim: int, seqlen: int, dstate: int, **options: Any) -> int:
    """Return the FLOPs of the backward pass: four scans' and the sum of the gradients of x."""
    return selective_scan_bwd_flops(batch, 4 * dim, seqlen, dstate, **options) + 3 * batch * dim * seqlen
