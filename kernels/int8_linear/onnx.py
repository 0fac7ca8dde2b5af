"""int8_linear under torch.export: ordinary operations, and in an ONNX graph its 8-bit product, MatMulInteger.

Codes of x and weight go into the ONNX graph as uint8, 128 higher where they are int8: runtimes multiply u8 by s8 with
an instruction that saturates on CPUs without VNNI, u8 by u8 exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.int8_linear.reference import finish, int8_linear_reference, out_dtype, x_codes


def _unsigned(codes: Tensor, signed: bool) -> Tensor:
    return (codes.to(torch.int32) + 128).to(torch.uint8) if signed else codes.to(torch.uint8)


def int8_linear_export(
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
    """Return the output in operations that the exporter can translate."""
    if not torch.onnx.is_in_onnx_export():
        return int8_linear_reference(
            x, weight_int8, weight_scale, bias, x_scale, x_zero_point, activation, out_scale, out_zero_point
        )
    codes, scale = x_codes(x, x_scale, x_zero_point)
    signed = x_zero_point is None or x_zero_point.dtype == torch.int8
    zero = torch.zeros((), dtype=torch.int8, device=x.device) if x_zero_point is None else x_zero_point
    sums = torch.onnx.ops.symbolic(
        "MatMulInteger",
        (
            _unsigned(codes, signed),
            _unsigned(weight_int8, True).t(),
            _unsigned(zero, signed),
            torch.full((), 128, dtype=torch.uint8, device=x.device),
        ),
        dtype=torch.int32,
        shape=(*x.shape[:-1], weight_int8.shape[0]),
    )
    if scale.ndim == 0:
        y = sums.float() * (scale * weight_scale.float())
    else:
        # ONNX Runtime 1.32 fuses a product of the two scales into MatMulIntegerToFloat as if the first were one
        # number, and computes something else
        y = sums.float() * weight_scale.float() * scale
    return finish(y, bias, activation, out_scale, out_zero_point, out_dtype(x, weight_scale))
