"""The residual norms on the CPU in C++ (csrc/add_norm): brings the arguments to the form the kernels take.

x, residual and dout go as contiguous rows in their dtype; weight and bias in the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.add_norm.reference import compute_dtype
from vitzoo.kernels.common import native

# Work items of the backward pass: each has its own sums for weight and bias, added up in a fixed order, so that the
# result does not depend on the number of threads.
ITEMS = 64
LEAST_ROWS = 8


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("x", x, "add_norm_fwd", "add_norm_bwd")


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _residual(x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return the residual as rows, in a dtype that is float64 exactly where that of x is."""
    if residual is None:
        return None
    mixed = (x.dtype == torch.float64) != (residual.dtype == torch.float64)
    return _rows(residual.to(compute_dtype(x)) if mixed else residual)


def _parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else p.to(compute_dtype(x)).contiguous()


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return (out, residual_out)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    residual_out = torch.empty(x.shape, dtype=compute_dtype(x))
    torch.ops.vitzoo_native.add_norm_fwd(
        _rows(x),
        _residual(x, residual),
        _parameter(weight, x),
        _parameter(bias, x),
        eps,
        center,
        out,
        residual_out,
    )
    return out, residual_out


def backward(
    dout: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual, weight and bias; None for absent inputs."""
    rows = _rows(x)
    part_rows = max(LEAST_ROWS, -(-rows.shape[0] // ITEMS))
    parts = -(-rows.shape[0] // part_rows)
    dtype = compute_dtype(x)
    stream = _residual(x, residual)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dresidual = None if stream is None else torch.empty(x.shape, dtype=stream.dtype)
    dweight = torch.empty((parts, weight.shape[0]), dtype=dtype)
    dbias = None if bias is None else torch.empty((parts, weight.shape[0]), dtype=dtype)
    torch.ops.vitzoo_native.add_norm_bwd(
        _rows(dout),
        None if dresidual_out is None else _rows(dresidual_out.to(dtype)),
        residual_out,
        rows,
        _parameter(weight, x),
        eps,
        center,
        part_rows,
        *(dx, dresidual, dweight, dbias),
    )
    return dx, dresidual, dweight.sum(0), None if dbias is None else dbias.sum(0)
