"""The operators vitzoo::cross_selective_scan and its backward pass, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register
from vitzoo.kernels.cross_selective_scan import cpu
from vitzoo.kernels.cross_selective_scan.flops import (
    cross_selective_scan_bwd_flops,
    cross_selective_scan_flops,
)
from vitzoo.kernels.cross_selective_scan.reference import composed, cross_selective_scan_reference


def _reference_bwd(dout: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(cross_selective_scan_reference, inputs, (dout,), tuple(range(7)))


OPERATOR = Operator(
    "cross_selective_scan",
    backends=(
        triton_support.backend("cross_selective_scan", triton_support.narrow_why_not("x")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": cross_selective_scan_reference, "backward": _reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _options(D: Any, delta_bias: Any, delta_softplus: bool) -> dict[str, Any]:
    return {
        "has_D": D is not None,
        "has_delta_bias": delta_bias is not None,
        "delta_softplus": delta_softplus,
    }


def _flops(x: Any, delta: Any, A: Any, B: Any, C: Any, *options: Any) -> int:
    return cross_selective_scan_flops(x[0], x[1], x[2] * x[3], A[2], **_options(*options))


def _paper_flops(x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, *others: Any) -> int:
    return 2 * cross_selective_scan_flops(
        x[0], x[1], x[2] * x[3], A[2], has_D=D is not None, convention="paper"
    )


def _backward_flops(dout: Any, x: Any, delta: Any, A: Any, B: Any, C: Any, *options: Any) -> int:
    return cross_selective_scan_bwd_flops(x[0], x[1], x[2] * x[3], A[2], **_options(*options))


_call = register(
    OPERATOR,
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus",
    ("out",),
    fake=lambda x, *args: x.new_empty(x.shape),
    flops=_flops,
    backward_flops=_backward_flops,
    paper_flops=_paper_flops,
    autocast_wide=("delta", "A", "D", "delta_bias"),
)


def _check(x: Tensor, A: Tensor, others: dict[str, Tensor | None]) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, D, H, W)")
    batch, dim, height, width = x.shape
    if A.ndim != 3 or A.shape[:2] != (4, dim):
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (4, D, N) = (4, {dim}, N)")
    rows = (batch, 4, A.shape[2], height, width)
    expected = {
        "delta": ("(B, 4, D, H, W)", (batch, 4, dim, height, width)),
        "B": ("(B, 4, N, H, W)", rows),
        "C": ("(B, 4, N, H, W)", rows),
        "D": ("(4, D)", (4, dim)),
        "delta_bias": ("(4, D)", (4, dim)),
    }
    for name, (letters, shape) in expected.items():
        tensor = others[name]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {letters} = {shape}")
    for name, tensor in ({"x": x, "A": A} | others).items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected a real floating-point dtype")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected the device of x, {x.device}")


def cross_selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run four selective scans over a map, one along each route of `cross_scan`, and sum them at every pixel.

    Route 0 goes row by row, route 1 column by column, routes 2 and 3 are those from the last pixel to the first. All
    arguments are maps in the order of the pixels: x is never copied into sequences. VMamba's projections to delta, B
    and C are pointwise, so they too can be 1x1 convolutions of x before any route is taken. The state is float32 for
    inputs of at most 32 bits and float64 for float64 inputs, and the four results are summed in that dtype. Every
    tensor has a gradient; second derivatives are refused.

    Args:
        x: input, (B, D, H, W), float32, float64, bfloat16 or float16; any strides, as every argument here.
        delta: step sizes before bias and softplus, one a route, (B, 4, D, H, W).
        A: rates of the states, (4, D, N), real; negative where states decay.
        B: how the input enters the state, (B, 4, N, H, W), shared by the channels of a route.
        C: how the state is read, (B, 4, N, H, W).
        D: skip weights, (4, D).
        delta_bias: added to delta, (4, D).
        delta_softplus: apply softplus to the steps.

    Returns:
        out, (B, D, H, W), contiguous, dtype of x: the sum over the routes, not the mean.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names the argument, its value and what was
            expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: VMamba, arXiv 2401.10166, section 4.2; MzeroMiko/VMamba at 2ed52ead, SS2D, forward type v05_noz.
    """
    _check(x, A, {"delta": delta, "B": B, "C": C, "D": D, "delta_bias": delta_bias})
    inputs: tuple[Any, ...] = (x, delta, A, B, C, D, delta_bias, delta_softplus)
    return composed(*inputs) if exporting() else _call(*inputs)
