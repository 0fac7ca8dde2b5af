"""int8_linear in plain PyTorch: the definition, exact in the integers on every device.

Legend: M rows of x (all leading axes), K inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_MAGNITUDE = 1e-30  # of a row whose scale is chosen: a row of zeros gets a scale too
ACTIVATIONS = ("gelu", "relu")


def code_range(dtype: torch.dtype) -> tuple[int, int]:
    """Return the least and the largest code of int8 or uint8."""
    info = torch.iinfo(dtype)
    return info.min, info.max


def row_scale(x: Tensor) -> Tensor:
    """Return max|x| / 127 of each row, (..., 1), float32."""
    return x.float().abs().amax(-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE) / 127.0


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return round(x / scale) + zero_point in the range of `dtype`, as int32; ties to even.

    Where x / scale is not a number the code is the zero point.
    """
    low, high = code_range(dtype)
    steps = x.float() / scale
    steps = torch.where(steps.isnan(), torch.zeros_like(steps), steps).round()
    zero = 0.0 if zero_point is None else zero_point.float()
    return (steps + zero).clamp(low, high).to(torch.int32)


def x_codes(x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the codes of x, (..., K), int32, and their scale, float32, of shape () or (..., 1)."""
    if x_scale is None:
        scale = row_scale(x)
    else:
        scale = x_scale.float() if x_scale.ndim == 0 else x_scale.float().unsqueeze(-1)
    if not x.is_floating_point():
        return x.to(torch.int32), scale
    return to_codes(x, scale, x_zero_point, torch.int8 if x_zero_point is None else x_zero_point.dtype), scale


def finish(
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (..., O), float32, through bias and activation, in `dtype` or as codes."""
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        y = F.gelu(y) if activation == "gelu" else F.relu(y)
    if out_scale is None:
        return y.to(dtype)
    code = torch.int8 if out_zero_point is None else out_zero_point.dtype
    return to_codes(y, out_scale.float(), out_zero_point, code).to(code)


def out_dtype(x: Tensor, weight_scale: Tensor) -> torch.dtype:
    """Return the dtype of an output that is not codes: of x where that is floating-point, else of weight_scale."""
    return x.dtype if x.is_floating_point() else weight_scale.dtype


def int8_linear_reference(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
) -> Tensor:
    """Return act(s_x s_w (codes of x - zero point) weight^T + bias), or its codes; see `op.int8_linear`.

    The sums are taken in float64, which holds every integer below 2^53: they are exact.

    Args:
        x: (..., K), floating-point or int8 or uint8.
        weight_int8: (O, K).
        weight_scale: (O,).
        bias: (O,).
        x_scale: () or one a row, x.shape[:-1]; None for max|x| / 127 of each row.
        x_zero_point: (), int8 or uint8.
        activation: None, "gelu" or "relu".
        out_scale: (); given, the output is codes.
        out_zero_point: (), int8 or uint8.
    """
    codes, scale = x_codes(x, x_scale, x_zero_point)
    if x_zero_point is not None:
        codes = codes - x_zero_point.to(torch.int32)
    sums = (codes.double() @ weight_int8.double().t()).to(torch.int32)
    y = sums.float() * (scale * weight_scale.float())
    return finish(y, bias, activation, out_scale, out_zero_point, out_dtype(x, weight_scale))
