"""Retention on the CPU in C++: one chunked kernel for every mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import linear_scan_cpu


def why_not(q: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return linear_scan_cpu.why_not(q, "q")


def log_decay(gammas: Tensor) -> Tensor:
    """Return log(gammas) in float64; a gamma of 0 becomes the smallest normal number."""
    return gammas.double().clamp(min=torch.finfo(torch.float64).tiny).log()


def as_call(
    q: Tensor, k: Tensor, v: Tensor, gammas: Tensor, initial_state: Tensor | None, scale: float, *form: Any
) -> linear_scan_cpu.Call:
    """Return the operator's arguments as those of linear attention."""
    return linear_scan_cpu.Call(q, k, v, log_decay(gammas), initial_state=initial_state, scale=scale)


def as_gradients(
    call: linear_scan_cpu.Call, gammas: Tensor, g: linear_scan_cpu.Gradients
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of the operator's arguments."""
    dgammas = g.rate.double() * torch.exp(-call.rate)  # d log gamma = d gamma / gamma
    return g.q, g.k, g.v, dgammas.to(gammas.dtype), None if call.initial_state is None else g.initial_state


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return (out, final_state)."""
    return linear_scan_cpu.forward(as_call(*inputs))


def backward(dout: Tensor, dstate: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, gammas and initial_state; None for an absent state."""
    call = as_call(*inputs)
    return as_gradients(call, inputs[3], linear_scan_cpu.backward(call, dout, dstate))
