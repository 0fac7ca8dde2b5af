"""The operators vitzoo::rms_norm_gated and vitzoo::rms_norm_gated_bwd, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register
from vitzoo.kernels.rms_norm_gated import cpu
from vitzoo.kernels.rms_norm_gated.reference import rms_norm_gated_reference


def _reference_backward(dout: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(rms_norm_gated_reference, inputs, (dout,), (0, 1, 2))


OPERATOR = Operator(
    "rms_norm_gated",
    backends=(
        triton_support.backend("rms_norm_gated", triton_support.narrow_why_not("x")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": rms_norm_gated_reference, "backward": _reference_backward},
            lambda *args: None,
        ),
    ),
)


def _no_flops(*args: Any) -> int:
    return 0  # norms are elementwise work, which published counts leave out


_call = register(
    OPERATOR,
    "Tensor x, Tensor weight, Tensor? z, float eps, bool norm_before_gate",
    ("out",),
    fake=lambda x, *args: x.new_empty(x.shape),
    flops=_no_flops,
    backward_flops=_no_flops,
    autocast_wide=("weight",),
)


def _check(x: Tensor, weight: Tensor, z: Tensor | None, eps: float) -> None:
    if x.ndim == 0:
        raise ValueError("x has shape (), expected (..., C)")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (C,) = ({x.shape[-1]},)")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}, expected that of x, {tuple(x.shape)}")
    for name, value in (("x", x), ("weight", weight), ("z", z)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number that is not negative")


def rms_norm_gated(
    x: Tensor, weight: Tensor, z: Tensor | None = None, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    """Normalise by the root mean square over the last axis, with a gate before or behind the norm.

    out = rmsnorm(x silu(z)) weight, or with `norm_before_gate` rmsnorm(x) weight silu(z), where
    rmsnorm(y) = y / sqrt(mean(y^2) + eps).

    Everything is computed in float32, float64 where x is float64. Every input has a gradient; second derivatives are
    refused.

    Args:
        x: (..., C), float32, float64, bfloat16 or float16.
        weight: (C,), any floating-point dtype.
        z: gate before silu, (..., C); None for the norm alone.
        eps: added to the mean of the squares.
        norm_before_gate: gate behind the norm instead of before it.

    Returns:
        (..., C), contiguous, dtype of x.

    Raises:
        ValueError: a shape, dtype, device or eps that does not fit; the message names the argument, its value and what
            was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Mamba-2, arXiv 2405.21060, section 7.1; state-spaces/mamba v2.0.4, rms_norm_ref of layernorm_gated.py.
    """
    _check(x, weight, z, eps)
    if exporting():
        return rms_norm_gated_reference(x, weight, z, eps, norm_before_gate)
    out: Tensor = _call(x, weight, z, eps, norm_before_gate)
    return out
