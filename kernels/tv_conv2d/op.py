"""The operators vitzoo::tv_conv2d and vitzoo::tv_conv2d_bwd, and the public function."""

from __future__ import annotations

from math import isqrt, prod
from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.tv_conv2d import cpu
from vitzoo.kernels.tv_conv2d.reference import tv_conv2d_reference, tv_conv2d_reference_bwd

OPERATOR = Operator(
    "tv_conv2d",
    backends=(
        triton_support.backend("tv_conv2d", triton_support.narrow_why_not("x")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": tv_conv2d_reference, "backward": tv_conv2d_reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], *weight.shape[2:]))


def _flops(x: Any, weight: Any, bias: Any, stride: int) -> int:
    return 2 * x[0] * prod(weight)


def _backward_flops(dout: Any, x: Any, weight: Any, bias: Any, stride: int) -> int:
    return 4 * x[0] * prod(weight)


_call = register(
    OPERATOR,
    "Tensor x, Tensor weight, Tensor? bias, int stride",
    ("out",),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    autocast_cast=("x", "weight", "bias"),
)


def tv_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolve each channel by a kernel of its own at every output position, without unfolding x.

    out[b, c, h, w] = sum_ij weight[c, i k + j, h, w] x[b, c, h stride + i - p, w stride + j - p] + bias[c, h, w], with
    p = (k - 1) / 2 and zeros around x.

    Sums are float32 for inputs of at most 32 bits, float64 for float64. Every input has a gradient; second derivatives
    are refused. Autocast casts all three to its dtype.

    Args:
        x: input, (B, C, H, W), float32, float64, bfloat16 or float16.
        weight: kernels, (C, k * k, H_out, W_out), k odd, taps row by row, H_out = (H - 1) // stride + 1; dtype of x.
        bias: (C, H_out, W_out), dtype of x.
        stride: of both axes.

    Returns:
        (B, C, H_out, W_out), contiguous, dtype of x.

    Raises:
        ValueError: a shape, dtype, device or size that does not fit; the message names the argument, its value and what
            was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: TVConv (arXiv 2203.10489); JierunChen/TVConv 609d4bf2, TVConv.forward.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, expected a floating-point dtype")
    if stride < 1:
        raise ValueError(f"stride is {stride}, expected a positive number")
    channels, height, width = x.shape[1:]
    out = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    if weight.ndim != 4 or weight.shape[0] != channels or weight.shape[2:] != out:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (C, k * k, H_out, W_out) = ({channels}, k * k, "
            f"{out[0]}, {out[1]})"
        )
    side = isqrt(weight.shape[1])
    if side * side != weight.shape[1] or side % 2 == 0:
        raise ValueError(f"weight has {weight.shape[1]} taps, expected the square of an odd number")
    if bias is not None and bias.shape != (channels, *out):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected (C, H_out, W_out) = {(channels, *out)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise ValueError(f"{name} is {value.dtype}, expected the dtype of x, {x.dtype}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")
    if exporting():
        return tv_conv2d_reference(x, weight, bias, stride)
    return _call(x, weight, bias, stride)
