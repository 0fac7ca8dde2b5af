"""Selective scan in CUDA C++ (csrc/selective_scan): brings the arguments to the form the kernels take.

u, delta, z and dout go in their own dtype and are made contiguous along the tokens where they are not; the small
tensors go in float32, B and C in rows padded to whole packs of tokens, so that every read of them is a vector load.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.selective_scan.cpu import fold, group_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACK = 8  # rows of B, C and their gradients are padded to a multiple of it
MAX_STATES = 256
MAX_THREADS = 128
# Blocks that the backward pass aims at: a few for each multiprocessor of a large GPU. Fewer would leave it idle, more
# would each write partial sums of dB and dC.
BACKWARD_BLOCKS = 2048


def why_not(
    u: Tensor | None = None, delta: Tensor | None = None, A: Tensor | None = None, *args: Any
) -> str | None:
    """Return why the CUDA kernels cannot take a call, or None."""
    if u is None or A is None:
        return native.cuda_why_not(None, "selective_scan_cuda_fwd", "selective_scan_cuda_bwd")
    for name, x in (("u", u), ("delta", delta), ("A", A)):
        if x is not None and x.dtype == torch.float64:
            return f"{name} is float64, and its sums are float32"
    if u.dtype not in DTYPES:
        return f"u is {u.dtype}, not float32, bfloat16 or float16"
    if A.shape[1] > MAX_STATES:
        return f"A has {A.shape[1]} states, more than {MAX_STATES}"
    return native.cuda_why_not(u, "selective_scan_cuda_fwd", "selective_scan_cuda_bwd")


def plan(seqlen: int) -> tuple[int, int]:
    """Return tokens a thread and threads a block; the sequence is cut in chunks of their product."""
    tokens = 4 if seqlen <= 128 else 8
    chunks = -(-seqlen // (tokens * MAX_THREADS))
    threads = -(-seqlen // (chunks * tokens))
    return tokens, -(-threads // 32) * 32


def part_channels(batch: int, groups: int, channels: int, dstate: int) -> int:
    """Return the channels a block of the backward pass takes, one after the other.

    The partial sums of dB and dC hold 2 N / part_channels floats a token and channel; four at most are allowed, as many
    as float32 u, delta, z and dout have.
    """
    parts = max(1, min(channels, -(-BACKWARD_BLOCKS // (batch * groups)), 2 * channels // dstate))
    return -(-channels // parts)


def _rows(matrix: Tensor, groups: int) -> Tensor:
    """Return B or C as (B, groups, N, padded L) or, constant, as (D, N); contiguous, float32."""
    if matrix.ndim == 2:
        return matrix.float().contiguous()
    if matrix.ndim == 3:
        matrix = matrix.unsqueeze(1)
    if matrix.shape[1] != groups:
        matrix = matrix.repeat_interleave(groups // matrix.shape[1], dim=1)
    batch, groups, dstate, seqlen = matrix.shape
    rows = matrix.new_zeros((batch, groups, dstate, -(-seqlen // PACK) * PACK), dtype=torch.float32)
    rows[..., :seqlen] = matrix
    return rows


def _tokens(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


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
    groups = math.lcm(group_count(B), group_count(C))

    def small(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    return (
        _tokens(u),
        _tokens(delta),
        small(A),
        _rows(B, groups),
        _rows(C, groups),
        small(D),
        _tokens(z),
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
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = torch.empty((u.shape[0], u.shape[1], A.shape[1]), dtype=torch.float32, device=u.device)
    torch.ops.vitzoo_native.selective_scan_cuda_fwd(
        *_inputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus, *plan(u.shape[2]), out, last_state
    )
    return out, last_state


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
    inputs = _inputs(u, delta, A, B, C, D, z, delta_bias)
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    rows = [m for m in inputs[3:5] if m.ndim == 4]
    groups = rows[0].shape[1] if rows else 1
    part = part_channels(batch, groups, dim // groups, dstate)
    parts = -(-(dim // groups) // part)
    tokens, threads = plan(seqlen)
    chunks = -(-seqlen // (tokens * threads))

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    def partial(matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:
            return floats(batch, dim, dstate)
        return floats(batch, parts, groups, dstate, matrix.shape[3])

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    du, ddelta, dz = like(u), like(delta), like(z)
    dA, dB, dC = floats(batch, dim, dstate), partial(inputs[3]), partial(inputs[4])
    dD, ddelta_bias = (None if x is None else floats(batch, dim) for x in (D, delta_bias))
    torch.ops.vitzoo_native.selective_scan_cuda_bwd(
        _tokens(dout if dout.dtype == u.dtype else dout.to(u.dtype)),
        None if dlast is None else dlast.float().contiguous(),
        *inputs,
        delta_softplus,
        *(tokens, threads, part),
        floats(batch, dim, chunks, dstate) if chunks > 1 else None,
        *(du, ddelta, dA, dB, dC, dD, dz, ddelta_bias),
    )
    return (
        du,
        ddelta,
        dA.sum(0),
        fold(dB[..., :seqlen] if dB.ndim == 5 else dB, B),
        fold(dC[..., :seqlen] if dC.ndim == 5 else dC, C),
        None if dD is None else dD.sum(0),
        dz,
        None if ddelta_bias is None else ddelta_bias.sum(0),
    )
