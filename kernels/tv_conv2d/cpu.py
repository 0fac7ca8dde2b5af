"""tv_conv2d on the CPU in C++ (csrc/tv_conv2d): brings the arguments to the form the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.tv_conv2d.reference import kernel_side

WORK_ITEMS = 32  # aimed at


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("x", x, "tv_conv2d_fwd", "tv_conv2d_bwd")


def _options(weight: Tensor, stride: int) -> tuple[int, int, int]:
    channels, _, height, _ = weight.shape
    blocks = min(height, max(1, -(-WORK_ITEMS // channels)))
    return kernel_side(weight), stride, -(-height // blocks)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Return the output."""
    out = torch.empty((x.shape[0], x.shape[1], *weight.shape[2:]), dtype=x.dtype)
    torch.ops.vitzoo_native.tv_conv2d_fwd(
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        *_options(weight, stride),
        out,
    )
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=dtype)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=dtype)
    torch.ops.vitzoo_native.tv_conv2d_bwd(
        dout.to(x.dtype).contiguous(),
        x.contiguous(),
        weight.contiguous(),
        *_options(weight, stride),
        *(dx, dweight, dbias),
    )
    return dx, dweight, dbias
