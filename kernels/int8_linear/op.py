"""The operator vitzoo::int8_linear and the public function."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.int8_linear import cpu
from vitzoo.kernels.int8_linear.reference import ACTIVATIONS, code_range, int8_linear_reference, out_dtype

OPERATOR = Operator(
    "int8_linear",
    backends=(
        triton_support.backend("int8_linear", triton_support.why_not, backward=None),
        Backend("cpu", {"forward": cpu.forward}, cpu.why_not),
        Backend("reference", {"forward": int8_linear_reference}, lambda *args: None),
    ),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, torch.uint8)
MOST_INPUTS = 65536  # 65536 x 255 x 128 is below 2^31


def _fake(
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
    dtype = out_dtype(x, weight_scale)
    if out_scale is not None:
        dtype = torch.int8 if out_zero_point is None else out_zero_point.dtype
    return x.new_empty((*x.shape[:-1], weight_int8.shape[0]), dtype=dtype)


def _flops(x: Any, weight_int8: Any, *others: Any) -> int:
    return 2 * prod(x) * weight_int8[0]


_call = register(
    OPERATOR,
    "Tensor x, Tensor weight_int8, Tensor weight_scale, Tensor? bias, Tensor? x_scale, Tensor? x_zero_point, "
    "str? activation, Tensor? out_scale, Tensor? out_zero_point",
    ("out",),
    fake=_fake,
    flops=_flops,
)


def _scale(name: str, scale: Tensor | float | None, device: torch.device, rows: Any) -> Tensor | None:
    """Return a scale as a tensor of shape () or, where `rows` allows it, one a row."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        if not scale > 0:
            raise ValueError(f"{name} is {scale}, expected a positive number")
        return torch.tensor(scale, dtype=torch.float32, device=device)
    if not scale.is_floating_point():
        raise ValueError(f"{name} is {scale.dtype}, expected a floating-point dtype")
    if scale.shape in ((), (1,)):
        return scale.reshape(())
    if rows is None or scale.shape != rows:
        wanted = "one element" if rows is None else f"one element or one a row, {tuple(rows)}"
        raise ValueError(f"{name} has shape {tuple(scale.shape)}, expected {wanted}")
    return scale


def _zero_point(
    name: str, zero: Tensor | int | None, device: torch.device, codes: torch.dtype | None
) -> Tensor | None:
    """Return a zero point as a tensor of shape () whose dtype is that of the codes."""
    if zero is None:
        return torch.zeros((), dtype=codes, device=device) if codes == torch.uint8 else None
    if isinstance(zero, Tensor):
        if zero.dtype not in CODES or zero.shape not in ((), (1,)):
            raise ValueError(
                f"{name} is {zero.dtype} of shape {tuple(zero.shape)}, expected one element of int8 or uint8"
            )
        if codes is not None and zero.dtype != codes:
            raise ValueError(f"{name} is {zero.dtype}, expected the dtype of x, {codes}")
        return zero.reshape(())
    low, high = code_range(codes or torch.int8)
    if not low <= zero <= high:
        raise ValueError(f"{name} is {zero}, expected {low} to {high}; for uint8 codes pass a uint8 tensor")
    return torch.tensor(zero, dtype=codes or torch.int8, device=device)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in FLOATS + CODES:
        raise ValueError(f"x is {x.dtype}, expected float32, bfloat16, float16, int8 or uint8")
    if weight.dtype != torch.int8:
        raise ValueError(f"weight_int8 is {weight.dtype}, expected int8")
    if weight.ndim != 2:
        raise ValueError(f"weight_int8 has shape {tuple(weight.shape)}, expected (O, I)")
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., I) = (..., {inputs})")
    if inputs > MOST_INPUTS:
        raise ValueError(f"weight_int8 has {inputs} inputs, expected at most {MOST_INPUTS}: sums are 32-bit")
    for name, value in (("weight_scale", weight_scale), ("bias", bias)):
        if value is not None and value.shape != (outputs,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (O,) = ({outputs},)")
        if value is not None and value.dtype not in FLOATS:
            raise ValueError(f"{name} is {value.dtype}, expected float32, bfloat16 or float16")


def int8_linear(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | float | None = None,
    x_zero_point: Tensor | int | None = None,
    activation: str | None = None,
    out_scale: Tensor | float | None = None,
    out_zero_point: Tensor | int | None = None,
) -> Tensor:
    """Multiply 8-bit codes of x by an int8 weight with 32-bit sums, then scale, add a bias, activate and requantize.

    q = clamp(round(x / x_scale) + x_zero_point);  y = act((q - x_zero_point) weight^T (x_scale weight_scale) + bias);
    with `out_scale` the result is clamp(round(y / out_scale) + out_zero_point). Rounding is to nearest, ties to even;
    the sums are exact on every CPU and GPU, and the CPU kernels of every instruction set give the same bits.

    There is no gradient: a backward pass through the operator is an error. Autocast leaves its arguments alone.

    Args:
        x: input, (..., I), float32, bfloat16 or float16, or codes, int8 or uint8. NaN becomes the zero point under a
            given scale, and makes its row NaN under a chosen one.
        weight_int8: symmetric codes of the weight, (O, I), int8, the whole range allowed; I at most 65536.
        weight_scale: scale of each output channel, (O,), float32, bfloat16 or float16.
        bias: (O,), likewise.
        x_scale: static scale, a number or one element; or one a row, x.shape[:-1]; positive. None chooses
            max|x| / 127 for each row, for floating-point x only.
        x_zero_point: a whole number. The codes have its dtype, int8 or uint8, where it is a tensor of one element; an
            int is taken as of x's dtype where x is codes, else as int8. None is zero, of int8 codes unless x is uint8.
        activation: None, "gelu" (by the error function) or "relu".
        out_scale: scale of the output's codes, a number or one element; None for floating-point output.
        out_zero_point: their zero point, in the forms of `x_zero_point`; None is zero, of int8 codes.

    Returns:
        (..., O): codes where `out_scale` is given, else of x's dtype, of weight_scale's where x is codes.

    Raises:
        ValueError: a shape, dtype, device or value that does not fit; the message names the argument, its value and
            what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.
    """
    _check(x, weight_int8, weight_scale, bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected None, {', '.join(map(repr, ACTIVATIONS))}")
    is_codes = not x.is_floating_point()
    if x_scale is None and is_codes:
        raise ValueError(f"x is {x.dtype} and x_scale is None, expected the scale of the codes")
    if x_scale is None and x_zero_point is not None:
        raise ValueError(
            f"x_zero_point is {x_zero_point} and x_scale is None, expected both: a chosen scale has none"
        )
    if out_scale is None and out_zero_point is not None:
        raise ValueError(f"out_zero_point is {out_zero_point} and out_scale is None, expected both")
    tensors = {
        "x_scale": _scale("x_scale", x_scale, x.device, x.shape[:-1]),
        "x_zero_point": _zero_point("x_zero_point", x_zero_point, x.device, x.dtype if is_codes else None),
        "out_scale": _scale("out_scale", out_scale, x.device, None),
        "out_zero_point": _zero_point("out_zero_point", out_zero_point, x.device, None),
    }
    for name, value in {
        "weight_int8": weight_int8,
        "weight_scale": weight_scale,
        "bias": bias,
        **tensors,
    }.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")
    arguments = (
        *(x, weight_int8, weight_scale, bias, tensors["x_scale"], tensors["x_zero_point"], activation),
        *(tensors["out_scale"], tensors["out_zero_point"]),
    )
    if exporting():
        from vitzoo.kernels.int8_linear.onnx import int8_linear_export

        return int8_linear_export(*arguments)
    return _call(*arguments)
