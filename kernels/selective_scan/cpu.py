"""Selective scan on the CPU in C++ (csrc/selective_scan): brings the arguments to the form the kernels take.

u, delta, z and dout go as they are, in their dtype and with their strides; the small tensors go in the compute dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import scan_support
from vitzoo.kernels.common.scan_support import (
    PIECE,
    TILE,
    as_wide_as,
    compute_dtype,
    forward_division,
    is_divided,
    part_channels,
)


def why_not(u: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return scan_support.why_not(u, "selective_scan_fwd", "selective_scan_bwd")


def _rows(matrix: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return B or C as (B, groups, N, L) or, constant, as (D, N); contiguous, in the compute dtype."""
    matrix = matrix.to(dtype)
    if matrix.ndim == 3:
        matrix = matrix.unsqueeze(1)
    if matrix.ndim == 4 and matrix.shape[1] != groups:
        matrix = matrix.repeat_interleave(groups // matrix.shape[1], dim=1)
    return matrix.contiguous()


def group_count(matrix: Tensor) -> int:
    """Return the groups of channels that B or C distinguishes; 1 for forms without that axis."""
    return matrix.shape[1] if matrix.ndim == 4 else 1


def _rows_of(B: Tensor, C: Tensor) -> tuple[int, bool]:
    """Return the groups of channels of B and C as `_inputs` gives them, and whether both vary along the tokens."""
    rows = [m for m in (B, C) if m.ndim == 4]
    return rows[0].shape[1] if rows else 1, len(rows) == 2


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Any, ...]:
    dtype = compute_dtype(u)
    groups = math.lcm(group_count(B), group_count(C))

    def wide_as_u(x: Tensor | None) -> Tensor | None:
        return None if x is None else as_wide_as(u, x)

    def small(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    return (
        u,
        wide_as_u(delta),
        small(A),
        _rows(B, groups, dtype),
        _rows(C, groups, dtype),
        small(D),
        wide_as_u(z),
        small(delta_bias),
    )


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out, last_state)."""
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias)
    out = torch.empty(u.shape, dtype=u.dtype)
    batch, dim, seqlen = u.shape
    last_state = torch.empty((batch, dim, A.shape[1]), dtype=compute_dtype(u))
    groups, varying = _rows_of(*inputs[3:5])
    channels, tokens = forward_division(batch, groups, dim, seqlen) if varying else (TILE, 0)
    torch.ops.vitzoo_native.selective_scan_fwd(*inputs, delta_softplus, channels, tokens, out, last_state)
    return out, last_state


def fold(partial: Tensor, matrix: Tensor) -> Tensor:
    """Add up the partial sums of dB or dC and bring them to the form of B or C."""
    if matrix.ndim == 2:
        return partial.flatten(0, -3).sum(0)
    total = partial.sum(1) if partial.shape[1] > 1 else partial.squeeze(1)  # (B, groups, N, L)
    if total.shape[1] != group_count(matrix):
        total = total.unflatten(1, (group_count(matrix), -1)).sum(2)
    return total.squeeze(1) if matrix.ndim == 3 else total


def backward(
    dout: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; None for absent inputs."""
    dtype = compute_dtype(u)
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias)
    batch, dim, seqlen = u.shape
    groups, varying = _rows_of(*inputs[3:5])
    piece = part_channels(batch, groups, dim // groups, A.shape[1])
    parts = -(-(dim // groups) // piece)
    tokens = PIECE if varying and is_divided(batch * groups * parts, seqlen) else 0
    pieces = -(-seqlen // tokens) if tokens else 1
    per_state = (batch, pieces, dim, A.shape[1])

    def partial(matrix: Tensor) -> Tensor:
        shape = per_state if matrix.ndim == 2 else (batch, parts, groups, A.shape[1], seqlen)
        return torch.empty(shape, dtype=dtype)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype)

    def by_channel(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty((batch, pieces, dim), dtype=dtype)

    du, ddelta, dz = like(u), like(inputs[1]), like(inputs[6])
    dA, dB, dC = torch.empty(per_state, dtype=dtype), partial(B), partial(C)
    dD, ddelta_bias = by_channel(D), by_channel(delta_bias)
    torch.ops.vitzoo_native.selective_scan_bwd(
        dout if dout.dtype == u.dtype else dout.to(u.dtype),
        None if dlast is None else dlast.to(dtype).contiguous(),
        *inputs,
        delta_softplus,
        piece,
        tokens,
        *(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias),
    )
    return (
        du,
        ddelta,
        dA.sum((0, 1)),
        fold(dB, B),
        fold(dC, C),
        None if dD is None else dD.sum((0, 1)),
        dz,
        None if ddelta_bias is None else ddelta_bias.sum((0, 1)),
    )
