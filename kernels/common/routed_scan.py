"""Several selective scans over one input, along routes of their own and added up into one output, on the CPU in C++.

csrc/selective_scan/README.md has the form of the arguments. Every tensor is in the order of the image, whatever the
route; u, delta, z and dout are read where they lie, and only B and C, which are small, are brought to their route's
order.

Legend: B batch, D channels, L = H W tokens, N state size, G groups of channels that share B and C, R routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.kernels.common import scan_support
from vitzoo.kernels.common.scan_support import (
    PIECE,
    as_wide_as,
    compute_dtype,
    forward_division,
    is_divided,
    part_channels,
)


class RoutedGradients(NamedTuple):
    """The gradients of a routed scan, in the forms of its arguments; None for what was absent."""

    u: list[Tensor]
    delta: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    D: list[Tensor] | None
    z: Tensor | None
    delta_bias: list[Tensor] | None


def why_not(u: Tensor | None) -> str | None:
    """Return why the C++ kernels cannot take a call on `u`, or None."""
    return scan_support.why_not(u, "routed_scan_fwd", "routed_scan_bwd")


def _along(rows: Tensor, route: int, width: int) -> Tensor:
    """Bring (..., L) from the order of the image to that of a route."""
    if route & 1:
        rows = rows.unflatten(-1, (-1, width)).transpose(-1, -2).flatten(-2)
    return rows.flip(-1) if route & 2 else rows


def _back(rows: Tensor, route: int, width: int) -> Tensor:
    """Undo `_along`."""
    rows = rows.flip(-1) if route & 2 else rows
    return _along(rows, 1, rows.shape[-1] // width) if route & 1 else rows


class _Arguments(NamedTuple):
    u: list[Tensor]
    delta: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    D: list[Tensor]
    z: Tensor | None
    delta_bias: list[Tensor]


def _arguments(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    z: Tensor | None,
    delta_bias: Sequence[Tensor] | None,
    routes: Sequence[int],
    width: int,
) -> _Arguments:
    dtype = compute_dtype(u[0])

    def small(list_: Sequence[Tensor] | None) -> list[Tensor]:
        return [x.to(dtype).contiguous() for x in list_ or ()]

    def rows(matrices: Sequence[Tensor]) -> list[Tensor]:
        by_group = [m.unsqueeze(1) if m.ndim == 3 else m for m in matrices]
        return [_along(m.to(dtype), r, width).contiguous() for m, r in zip(by_group, routes, strict=True)]

    return _Arguments(
        [as_wide_as(u[0], x) for x in u],
        [as_wide_as(u[0], x) for x in delta],
        small(A),
        rows(B),
        rows(C),
        small(D),
        None if z is None else as_wide_as(u[0], z),
        small(delta_bias),
    )


def forward(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    z: Tensor | None,
    delta_bias: Sequence[Tensor] | None,
    delta_softplus: bool,
    routes: Sequence[int],
    width: int,
) -> Tensor:
    """Return silu(z) times the sum of the scans, (B, D, L), contiguous, in the dtype of u[0].

    Args:
        u: inputs, (B, D, L), one for all routes or one for each.
        delta: step of each route before bias and softplus, (B, D, L).
        A: rates of the states of each route, (D, N).
        B: how the input enters the state of each route, (B, N, L) or (B, G, N, L).
        C: how the state is read, likewise.
        D: skip weight of each route, (D,).
        z: gate before silu, (B, D, L).
        delta_bias: of each route, (D,).
        delta_softplus: apply softplus to delta.
        routes: 0 row by row, 1 column by column, 2 and 3 these from the end.
        width: W of the image; L for routes 0 and 2 alone.
    """
    given = _arguments(u, delta, A, B, C, D, z, delta_bias, routes, width)
    out = torch.empty(u[0].shape, dtype=u[0].dtype)
    division = forward_division(u[0].shape[0], given.B[0].shape[1], *u[0].shape[1:])
    torch.ops.vitzoo_native.routed_scan_fwd(*given, delta_softplus, list(routes), width, *division, out)
    return out


def backward(
    dout: Tensor,
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    z: Tensor | None,
    delta_bias: Sequence[Tensor] | None,
    delta_softplus: bool,
    routes: Sequence[int],
    width: int,
    *,
    ddelta: Sequence[Tensor] | None = None,
) -> RoutedGradients:
    """Return the gradients of the arguments of `forward`, `dout` being that of its result.

    `ddelta` is where the gradients of the steps go, in the form and dtype of `delta` and contiguous along the tokens;
    None for new memory.
    """
    given = _arguments(u, delta, A, B, C, D, z, delta_bias, routes, width)
    batch, dim, seqlen = u[0].shape
    dtype, dstate, groups = compute_dtype(u[0]), A[0].shape[1], given.B[0].shape[1]
    piece = part_channels(batch, groups, dim // groups, dstate)
    parts = -(-(dim // groups) // piece)
    tokens = PIECE if is_divided(batch * groups * parts, seqlen) else 0
    pieces = -(-seqlen // tokens) if tokens else 1

    def empty(count: int, *shape: int) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for _ in range(count)]

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype)

    count = len(routes)
    du = [like(x) for x in given.u]
    dsteps = [like(x) for x in given.delta] if ddelta is None else list(ddelta)
    dA = empty(count, batch, pieces, dim, dstate)
    dB, dC = (empty(count, batch, parts, groups, dstate, seqlen) for _ in range(2))
    dD, dbias = (empty(len(x), batch, pieces, dim) for x in (given.D, given.delta_bias))
    dz = None if given.z is None else like(given.z)
    torch.ops.vitzoo_native.routed_scan_bwd(
        dout.to(u[0].dtype),
        *given,
        delta_softplus,
        list(routes),
        width,
        piece,
        tokens,
        *(du, dsteps, dA, dB, dC, dD, dz, dbias),
    )

    def fold(partial: list[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        sums = [p.sum(1) if parts > 1 else p.squeeze(1) for p in partial]
        return [_back(s, r, width).reshape(m.shape) for s, r, m in zip(sums, routes, matrices, strict=True)]

    return RoutedGradients(
        du,
        dsteps,
        [x.sum((0, 1)) for x in dA],
        fold(dB, B),
        fold(dC, C),
        None if D is None else [x.sum((0, 1)) for x in dD],
        dz,
        None if delta_bias is None else [x.sum((0, 1)) for x in dbias],
    )
