"""The scan of Mamba-2 in Triton: C, B and x are q, k and v of linear attention, A is the decay's rate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import linear_scan_triton
from vitzoo.kernels.ssd_scan.cpu import as_call, as_gradients

AHEAD = linear_scan_triton.ahead(has_z=True, has_skip=True)


def why_not(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any) -> str | None:
    """Return why the Triton kernels cannot take a call, or None."""
    return linear_scan_triton.why_not(x, "x", B.shape[3], x.shape[3])


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return (out, final_states)."""
    out, state = linear_scan_triton.forward(as_call(*inputs))
    return out, state.transpose(-1, -2)


def backward(dout: Tensor, dstates: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dt, A, B, C, D, z and dt_bias; None for absent inputs."""
    call = as_call(*inputs)
    dstate = None if dstates is None else dstates.transpose(-1, -2)
    return as_gradients(call, linear_scan_triton.backward(call, dout, dstate))
