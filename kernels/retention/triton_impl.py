"""Retention in Triton: one chunked formulation for every mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import linear_scan_triton
from vitzoo.kernels.retention.cpu import as_call, as_gradients

AHEAD = linear_scan_triton.ahead(has_z=False, has_skip=False)


def why_not(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """Return why the Triton kernels cannot take a call, or None."""
    return linear_scan_triton.why_not(q, "q", q.shape[3], v.shape[3])


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return (out, final_state)."""
    return linear_scan_triton.forward(as_call(*inputs))


def backward(dout: Tensor, dstate: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, gammas and initial_state; None for an absent state."""
    call = as_call(*inputs)
    return as_gradients(call, inputs[3], linear_scan_triton.backward(call, dout, dstate))
