"""int8_linear on the CPU in C++ (csrc/int8_linear): brings the arguments to the form the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.int8_linear.reference import ACTIVATIONS, out_dtype


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    if x is not None and x.device.type != "cpu":
        return f"it runs on the CPU only and x is on {x.device}"
    return native.why_not("int8_linear_fwd")


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return x as (M, K) with contiguous rows, or as (B, L, K) whose rows lie side by side: those the kernels turn."""
    if x.ndim == 3 and x.dtype == torch.float32 and x.stride(1) == 1 and x.stride(2) >= x.shape[1] > 1:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def forward(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    activation: str | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Return the output."""
    dtype = out_dtype(x, weight_scale)
    if out_scale is not None:
        dtype = torch.int8 if out_zero_point is None else out_zero_point.dtype
    out = torch.empty((*x.shape[:-1], weight_int8.shape[0]), dtype=dtype)
    codes = x.dtype if x_zero_point is None else x_zero_point.dtype
    torch.ops.vitzoo_native.int8_linear_fwd(
        _rows(x),
        weight_int8.contiguous(),
        _floats(weight_scale),
        _floats(bias),
        None if x_scale is None else _floats(x_scale.reshape(-1)),
        0 if x_zero_point is None else int(x_zero_point),
        codes != torch.uint8,
        0 if activation is None else 1 + ACTIVATIONS.index(activation),
        1.0 if out_scale is None else float(out_scale),
        0 if out_zero_point is None else int(out_zero_point),
        out,
    )
    return out
