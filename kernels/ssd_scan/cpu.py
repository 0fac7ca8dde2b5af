"""The scan of Mamba-2 on the CPU in C++: C, B and x are q, k and v of linear attention, A is the decay's rate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import linear_scan_cpu


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return linear_scan_cpu.why_not(x, "x")


def as_call(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> linear_scan_cpu.Call:
    """Return the operator's arguments as those of linear attention."""
    return linear_scan_cpu.Call(C, B, x, A, dt, dt_bias, dt_softplus, D, z)


def as_gradients(call: linear_scan_cpu.Call, g: linear_scan_cpu.Gradients) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of the operator's arguments."""
    assert g.dt is not None
    dt_bias = None if call.dt_bias is None else g.dt.sum((0, 1))
    return g.v, g.dt, g.rate, g.k, g.q, g.D, g.z, dt_bias


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return (out, final_states)."""
    out, state = linear_scan_cpu.forward(as_call(*inputs))
    return out, state.transpose(-1, -2)


def backward(dout: Tensor, dstates: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dt, A, B, C, D, z and dt_bias; None for absent inputs."""
    call = as_call(*inputs)
    dstate = None if dstates is None else dstates.transpose(-1, -2)
    return as_gradients(call, linear_scan_cpu.backward(call, dout, dstate))
