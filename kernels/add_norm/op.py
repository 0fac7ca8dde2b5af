"""The operators vitzoo::add_rms_norm and vitzoo::add_layer_norm, their backward passes, and the public functions."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vitzoo.kernels.add_norm import cpu
from vitzoo.kernels.add_norm.reference import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    compute_dtype,
)
from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register


def _rms_cpu_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
    return cpu.forward(x, residual, weight, None, eps, False)


def _rms_cpu_backward(dout: Tensor, dr: Tensor | None, r: Tensor, x: Tensor, *args: Any) -> Any:
    residual, weight, eps = args
    return cpu.backward(dout, dr, r, x, residual, weight, None, eps, False)[:3]


_triton_why_not = triton_support.narrow_why_not("x")
_triton_forward = triton_support.lazily("add_norm", "forward")
_triton_backward = triton_support.lazily("add_norm", "backward")


def _rms_triton_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
    return _triton_forward(x, residual, weight, None, eps, False)


def _rms_triton_backward(dout: Tensor, dr: Tensor | None, r: Tensor, x: Tensor, *args: Any) -> Any:
    residual, weight, eps = args
    return _triton_backward(dout, dr, r, x, residual, weight, None, eps, False)[:3]


def _rms_reference_backward(dout: Tensor, dr: Tensor | None, r: Tensor, *inputs: Any) -> Any:
    return backward_by_autograd(add_rms_norm_reference, inputs, (dout, dr), (0, 1, 2))


def _layer_triton_forward(*args: Any) -> Any:
    return _triton_forward(*args, True)


def _layer_triton_backward(*args: Any) -> Any:
    return _triton_backward(*args, True)


def _layer_reference_backward(dout: Tensor, dr: Tensor | None, r: Tensor, *inputs: Any) -> Any:
    return backward_by_autograd(add_layer_norm_reference, inputs, (dout, dr), (0, 1, 2, 3))


ADD_RMS_NORM = Operator(
    "add_rms_norm",
    backends=(
        Backend(
            "triton",
            {"forward": _rms_triton_forward, "backward": _rms_triton_backward},
            _triton_why_not,
        ),
        Backend("cpu", {"forward": _rms_cpu_forward, "backward": _rms_cpu_backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": add_rms_norm_reference, "backward": _rms_reference_backward},
            lambda *args: None,
        ),
    ),
)
ADD_LAYER_NORM = Operator(
    "add_layer_norm",
    backends=(
        Backend(
            "triton",
            {"forward": _layer_triton_forward, "backward": _layer_triton_backward},
            _triton_why_not,
        ),
        Backend(
            "cpu",
            {"forward": partial(cpu.forward, center=True), "backward": partial(cpu.backward, center=True)},
            cpu.why_not,
        ),
        Backend(
            "reference",
            {"forward": add_layer_norm_reference, "backward": _layer_reference_backward},
            lambda *args: None,
        ),
    ),
)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=compute_dtype(x))


def _no_flops(*args: Any) -> int:
    return 0  # norms are elementwise work, which published counts leave out


_call_add_rms_norm = register(
    ADD_RMS_NORM,
    "Tensor x, Tensor? residual, Tensor weight, float eps",
    ("out", "residual_out"),
    fake=_fake,
    flops=_no_flops,
    backward_flops=_no_flops,
    saved=("residual_out",),
    autocast_wide=("residual", "weight"),
)
_call_add_layer_norm = register(
    ADD_LAYER_NORM,
    "Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps",
    ("out", "residual_out"),
    fake=_fake,
    flops=_no_flops,
    backward_flops=_no_flops,
    saved=("residual_out",),
    autocast_wide=("residual", "weight", "bias"),
)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    if x.ndim == 0:
        raise ValueError("x has shape (), expected (..., C)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected (C,) = ({x.shape[-1]},)")
    for name, value in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number that is not negative")


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum by its root mean square.

    residual_out = x + residual;  out = residual_out / sqrt(mean(residual_out^2) + eps) * weight, over the last axis.

    The sum and everything after it are float32, float64 where x is float64. Every input has a gradient, through both
    outputs; second derivatives are refused.

    Args:
        x: what the branch gave, (..., C), float32, float64, bfloat16 or float16.
        residual: the stream, (..., C), any floating-point dtype; None in a network's first block.
        weight: (C,).
        eps: added to the mean of the squares.

    Returns:
        out, (..., C), dtype of x, and residual_out, (..., C), float32 (float64 where x is float64), both contiguous.

    Raises:
        ValueError: a shape, dtype, device or eps that does not fit; the message names the argument, its value and what
            was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: arXiv 1910.07467, equation 4; hustvl/Vim, rms_norm_ref with prenorm.
    """
    _check(x, residual, weight, None, eps)
    if exporting():
        return add_rms_norm_reference(x, residual, weight, eps)
    out, residual_out = _call_add_rms_norm(x, residual, weight, eps)
    return out, residual_out


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum to zero mean and unit variance.

    residual_out = x + residual;  out = (residual_out - mean) / sqrt(var + eps) * weight + bias, over the last axis.
    For dtypes, gradients and errors see `add_rms_norm`.

    Args:
        x: what the branch gave, (..., C).
        residual: the stream, (..., C); None in a network's first block.
        weight: (C,).
        bias: (C,).
        eps: added to the variance.

    Returns:
        out, (..., C), dtype of x, and residual_out, (..., C), float32 (float64 where x is float64), both contiguous.

    Raises:
        ValueError: as in `add_rms_norm`.

    Source: arXiv 1607.06450, equation 4; hustvl/Vim, layer_norm_ref with prenorm.
    """
    _check(x, residual, weight, bias, eps)
    if exporting():
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    out, residual_out = _call_add_layer_norm(x, residual, weight, bias, eps)
    return out, residual_out
