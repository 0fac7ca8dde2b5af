"""The operators vitzoo::cross_scan and vitzoo::cross_merge, and the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.cross_scan import cpu
from vitzoo.kernels.cross_scan.reference import cross_merge_reference, cross_scan_reference


def _scan_backward(dout: Tensor, x: Tensor) -> Tensor:
    return cross_merge_reference(dout, x.shape[2], x.shape[3])


def _merge_backward(dout: Tensor, y: Tensor, H: int, W: int) -> Tensor:
    return cross_scan_reference(dout)


SCAN = Operator(
    "cross_scan",
    backends=(
        triton_support.backend("cross_scan", triton_support.why_not, "scan", "scan_backward"),
        Backend("cpu", {"forward": cpu.scan, "backward": cpu.scan_backward}, cpu.why_not),
        Backend(
            "reference", {"forward": cross_scan_reference, "backward": _scan_backward}, lambda *args: None
        ),
    ),
)
MERGE = Operator(
    "cross_merge",
    backends=(
        triton_support.backend("cross_scan", triton_support.why_not, "merge", "merge_backward"),
        Backend("cpu", {"forward": cpu.merge, "backward": cpu.merge_backward}, cpu.why_not),
        Backend(
            "reference", {"forward": cross_merge_reference, "backward": _merge_backward}, lambda *args: None
        ),
    ),
)


def _nothing(*args: Any) -> int:
    return 0  # copies and sums of copies, which no table counts


_call_cross_scan = register(
    SCAN,
    "Tensor x",
    ("out",),
    fake=lambda x: x.new_empty((x.shape[0], 4, x.shape[1], x.shape[2] * x.shape[3])),
    flops=_nothing,
    backward_flops=_nothing,
)
_call_cross_merge = register(
    MERGE,
    "Tensor y, SymInt H, SymInt W",
    ("out",),
    fake=lambda y, H, W: y.new_empty((y.shape[0], y.shape[2], H, W)),
    flops=_nothing,
    backward_flops=_nothing,
)


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, expected a floating-point dtype")


def cross_scan(x: Tensor) -> Tensor:
    """Read a map along VMamba's four routes: row by row, column by column, and both backwards.

    Args:
        x: map, (B, C, H, W), float32, float64, bfloat16 or float16; copied once where it is not contiguous.

    Returns:
        (B, 4, C, H * W), contiguous, dtype of x. The gradient of x is `cross_merge` of this one's.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names it and what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: VMamba, arXiv 2401.10166, section 4.2; MzeroMiko/VMamba at 2ed52ead, cross_scan_fwd.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    _check_floating("x", x)
    return cross_scan_reference(x) if exporting() else _call_cross_scan(x)


def cross_merge(y: Tensor, H: int, W: int) -> Tensor:
    """Undo the routes of `cross_scan` and add the four sequences up.

    Args:
        y: four sequences, (B, 4, C, H * W), float32, float64, bfloat16 or float16 (summed in float32); copied once
            where it is not contiguous.
        H: height of the map.
        W: width of the map.

    Returns:
        (B, C, H, W), contiguous, dtype of y: the sum, not the mean. The gradient of y is `cross_scan` of this one's.

    Raises:
        ValueError: a shape or dtype that does not fit; the message names it and what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: VMamba, arXiv 2401.10166, section 4.2; MzeroMiko/VMamba at 2ed52ead, cross_merge_fwd.
    """
    for name, size in (("H", H), ("W", W)):
        if size < 0:
            raise ValueError(f"{name} is {size}, expected a size")
    if y.ndim != 4 or y.shape[1] != 4 or y.shape[3] != H * W:
        raise ValueError(f"y has shape {tuple(y.shape)}, expected (B, 4, C, H * W) = (B, 4, C, {H * W})")
    _check_floating("y", y)
    return cross_merge_reference(y, H, W) if exporting() else _call_cross_merge(y, H, W)
