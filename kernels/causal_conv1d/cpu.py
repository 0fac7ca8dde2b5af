"""Causal convolution on the CPU in C++ (csrc/causal_conv1d): brings the arguments to the form the kernels take.

x, dout and the states go in their dtype and with their strides, unless neither tokens nor channels are contiguous;
weight and bias go in the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.causal_conv1d.reference import compute_dtype
from vitzoo.kernels.causal_conv1d.states import add_final_gradient
from vitzoo.kernels.common import native

TILE = 16  # channels of a work item: a multiple of every vector width
# Work items aimed at; the number depends on the shape alone, so that no result depends on the number of threads.
ITEMS = 64
LEAST_TOKENS = 128  # of a work item, unless there are fewer


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("x", x, "causal_conv1d_fwd", "causal_conv1d_bwd")


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = compute_dtype(x)
    return (
        _as_rows_or_columns(x, channels_last),
        weight.to(dtype).contiguous(),
        None if bias is None else bias.to(dtype).contiguous(),
        None if initial_states is None else initial_states.to(x.dtype),
    )


def _as_rows_or_columns(x: Tensor, channels_last: bool) -> Tensor:
    """Return x as (B, D, L) whose channels (with `channels_last`) or tokens are contiguous, copied if they are not."""
    x = x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
    return x.transpose(1, 2) if channels_last else x


def part_tokens(batch: int, dim: int, seqlen: int) -> int:
    """Return how many tokens one work item takes: all, unless the channels give too few items."""
    wanted = -(-ITEMS // (batch * -(-dim // TILE)))
    parts = max(1, min(wanted, seqlen // LEAST_TOKENS))
    return -(-seqlen // parts)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out, final_states), out in the order of axes of x."""
    x, *others = _inputs(x, weight, bias, initial_states, channels_last)
    batch, dim, seqlen = x.shape
    out = torch.empty((batch, seqlen, dim) if channels_last else (batch, dim, seqlen), dtype=x.dtype)
    final_states = torch.empty((batch, dim, weight.shape[1] - 1), dtype=x.dtype)
    torch.ops.vitzoo_native.causal_conv1d_fwd(
        x,
        *others,
        silu,
        reverse,
        part_tokens(batch, dim, seqlen),
        out.transpose(1, 2) if channels_last else out,
        final_states,
    )
    return out, final_states


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and initial_states; None for absent inputs."""
    x, *others = _inputs(x, weight, bias, initial_states, channels_last)
    batch, dim, seqlen = x.shape
    dtype, tokens = compute_dtype(x), part_tokens(batch, dim, seqlen)
    parts = -(-seqlen // tokens)
    dx = torch.empty((batch, seqlen, dim) if channels_last else (batch, dim, seqlen), dtype=x.dtype)
    dx_as_x = dx.transpose(1, 2) if channels_last else dx
    dweight = torch.empty((batch * parts, dim, weight.shape[1]), dtype=dtype)
    dbias = None if bias is None else torch.empty((batch * parts, dim), dtype=dtype)
    dinitial = None if initial_states is None else torch.empty(initial_states.shape, dtype=x.dtype)
    torch.ops.vitzoo_native.causal_conv1d_bwd(
        _as_rows_or_columns(dout.to(x.dtype), channels_last),
        x,
        *others,
        silu,
        reverse,
        tokens,
        *(dx_as_x, dweight, dbias, dinitial),
    )
    if dfinal is not None:
        add_final_gradient(dfinal, dx_as_x, dinitial, reverse)
    return dx, dweight.sum(0), None if dbias is None else dbias.sum(0), dinitial
