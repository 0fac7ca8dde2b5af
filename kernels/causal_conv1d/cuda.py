"""Causal convolution in CUDA C++ (csrc/causal_conv1d): brings the arguments to the form the kernels take.

x, dout and the states go in their own dtype; x in either order of axes, with neighbouring threads along the one that is
contiguous. Weight and bias go in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_THREADS = 128


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the CUDA kernels cannot take a call, or None."""
    if x is not None and x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    return native.cuda_why_not(x, "causal_conv1d_cuda_fwd", "causal_conv1d_cuda_bwd")


def plan(dim: int, seqlen: int, columns: bool) -> tuple[int, int]:
    """Return tokens a segment, which one block takes, and threads a block.

    Args:
        dim: D.
        seqlen: L.
        columns: whether threads lie along the channels rather than along the tokens.
    """
    if columns:
        return 16, min(MAX_THREADS, -(-dim // 32) * 32)
    # up to eight tokens a thread: enough loads in flight, and one reading of the weights for them
    threads = min(MAX_THREADS, -(-seqlen // 128) * 32)
    return threads * 8, threads


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x = x.contiguous()
    return (
        x.transpose(1, 2) if channels_last else x,
        weight.float().contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if initial_states is None else initial_states.to(x.dtype),
    )


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
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, *others = _inputs(x, weight, bias, initial_states, channels_last)
    batch, dim, seqlen = x.shape
    final_states = torch.empty((batch, dim, weight.shape[1] - 1), dtype=x.dtype, device=x.device)
    torch.ops.vitzoo_native.causal_conv1d_cuda_fwd(
        x,
        *others,
        *(silu, reverse, channels_last, *plan(dim, seqlen, channels_last)),
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
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, *others = _inputs(x, weight, bias, initial_states, channels_last)
    batch, dim, seqlen = x.shape
    segment, threads = plan(dim, seqlen, channels_last)
    parts = batch * -(-seqlen // segment)
    dout = dout.to(x.dtype).contiguous()
    dweight = torch.empty((parts, dim, weight.shape[1]), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty((parts, dim), dtype=torch.float32, device=x.device)
    dinitial = None if initial_states is None else torch.empty_like(initial_states, dtype=x.dtype)
    torch.ops.vitzoo_native.causal_conv1d_cuda_bwd(
        dout.transpose(1, 2) if channels_last else dout,
        None if dfinal is None else dfinal.to(x.dtype),
        x,
        *others,
        *(silu, reverse, channels_last, segment, threads),
        dx.transpose(1, 2) if channels_last else dx,
        *(dweight, dbias, dinitial),
    )
    return dx, dweight.sum(0), None if dbias is None else dbias.sum(0), dinitial
