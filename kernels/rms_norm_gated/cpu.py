"""The gated RMS norm on the CPU in C++ (csrc/rms_norm_gated): brings the arguments to the form the kernels take.

x, z and dout go as contiguous rows in their dtype; the weight in the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.rms_norm_gated.reference import compute_dtype

# Work items of the backward pass: each has its own sums for the weight, added up in a fixed order, so that the result
# does not depend on the number of threads.
ITEMS = 64
LEAST_ROWS = 8


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("x", x, "rms_norm_gated_fwd", "rms_norm_gated_bwd")


def _inputs(x: Tensor, weight: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = compute_dtype(x)
    if z is not None and (z.dtype == torch.float64) != (x.dtype == torch.float64):
        z = z.to(dtype)
    rows = (-1, x.shape[-1])
    return (
        x.contiguous().view(rows),
        weight.to(dtype).contiguous(),
        None if z is None else z.contiguous().view(rows),
    )


def forward(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, norm_before_gate: bool) -> Tensor:
    """Return out."""
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.vitzoo_native.rms_norm_gated_fwd(*_inputs(x, weight, z), eps, norm_before_gate, out)
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, norm_before_gate: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and z; None for an absent z."""
    rows, w, gate = _inputs(x, weight, z)
    part_rows = max(LEAST_ROWS, -(-rows.shape[0] // ITEMS))
    dx = torch.empty(x.shape, dtype=x.dtype)
    dz = None if gate is None else torch.empty(x.shape, dtype=gate.dtype)
    dweight = torch.empty((-(-rows.shape[0] // part_rows), w.shape[0]), dtype=w.dtype)
    torch.ops.vitzoo_native.rms_norm_gated_bwd(
        dout.contiguous(), rows, w, gate, eps, norm_before_gate, part_rows, dx, dweight, dz
    )
    return dx, dweight.sum(0), dz
