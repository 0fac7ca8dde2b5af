"""Bidirectional selective scan for torch.export: both directions as groups of one scan, so one ONNX Scan a call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vitzoo.kernels.bidirectional_selective_scan.reference import compute_dtype, flipped, gated
from vitzoo.kernels.selective_scan import selective_scan


def _both(matrix: Tensor, other: Tensor) -> Tensor:
    """Return B or C of both directions, the second one's tokens reversed, as groups (or rows, where constant)."""
    if matrix.ndim == 2:
        return torch.cat((matrix, other))
    if matrix.ndim == 3:
        return torch.stack((matrix, other.flip(-1)), dim=1)
    return torch.cat((matrix, flipped(other)), dim=1)


def _joined(x: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if x is None or other is None else torch.cat((x, other))


def bidirectional_selective_scan_export(
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
    """Return what `bidirectional_selective_scan_reference` does, in a form that torch.onnx can translate."""
    both = torch.cat((u, (u if u_b is None else u_b).flip(-1)), dim=1).to(compute_dtype(u))
    y = selective_scan(
        both,
        torch.cat((delta, delta_b.flip(-1)), dim=1),
        torch.cat((A, A_b)),
        _both(B, B_b),
        _both(C, C_b),
        _joined(D, D_b),
        None,
        _joined(delta_bias, delta_bias_b),
        delta_softplus,
    )
    ahead, back = cast(Tensor, y).chunk(2, dim=1)
    return gated(ahead + back.flip(-1), z, u.dtype)
