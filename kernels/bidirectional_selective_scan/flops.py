"""How many floating-point operations a bidirectional selective scan takes; see selective_scan/flops.py."""

from __future__ import annotations

from typing import Any

from vitzoo.kernels.selective_scan import selective_scan_bwd_flops, selective_scan_flops


def bidirectional_selective_scan_flops(
    batch: int,
    dim: int,
    seqlen: int,
    dstate: int,
    *,
    has_z: bool = False,
    convention: str = "exact",
    **options: Any,
) -> int:
    """Return the FLOPs (not MACs) of the forward pass: two scans, their sum, and one gate.

    Args:
        batch: B.
        dim: D, scan channels.
        seqlen: L.
        dstate: N.
        has_z: with the gate.
        convention: "exact" or "paper", as in `selective_scan_flops`.
        options: has_D, has_delta_bias and delta_softplus, likewise.

    Raises:
        ValueError: an unknown convention.
    """
    scans = 2 * selective_scan_flops(batch, dim, seqlen, dstate, convention=convention, **options)
    tokens = batch * dim * seqlen
    if convention == "paper":
        return scans + tokens * has_z
    return scans + tokens * (1 + 5 * has_z)


def bidirectional_selective_scan_bwd_flops(
    batch: int,
    dim: int,
    seqlen: int,
    dstate: int,
    *,
    has_z: bool = False,
    has_u_b: bool = True,
    **options: Any,
) -> int:
    """Return the FLOPs of the backward pass: two scans', with the gate's own part (11 a token) once.

    The sum of the directions is made again for the gate, and that of the input's gradients where the input is shared.
    """
    scans = 2 * selective_scan_bwd_flops(batch, dim, seqlen, dstate, has_z=has_z, **options)
    return scans + batch * dim * seqlen * ((1 - 11) * has_z + (not has_u_b))
