"""tv_conv2d in plain PyTorch: the definition (TVConv, arXiv 2203.10489), one tap at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.registration import backward_by_autograd


def kernel_side(weight: Tensor) -> int:
    """Return k of a weight (C, k * k, H_out, W_out)."""
    return math.isqrt(weight.shape[1])


def tv_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Return sum_ij weight[c, i k + j, h, w] x[c, h stride + i - p, w stride + j - p] (+ bias), p = (k - 1) / 2.

    Computed in at least float32; see `op.tv_conv2d`.

    Args:
        x: (B, C, H, W).
        weight: (C, k * k, H_out, W_out).
        bias: (C, H_out, W_out).
        stride: of both axes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    side, (height, width) = kernel_side(weight), weight.shape[2:]
    pad = (side - 1) // 2
    padded, kernels = F.pad(x.to(dtype), (pad, pad, pad, pad)), weight.to(dtype)
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    out = torch.zeros(1, dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    for i in range(side):
        for j in range(side):
            out = (
                out + kernels[:, i * side + j] * padded[:, :, i : i + rows : stride, j : j + columns : stride]
            )
    return out.to(x.dtype)


def tv_conv2d_reference_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias."""
    return backward_by_autograd(tv_conv2d_reference, (x, weight, bias, stride), (dout,), (0, 1, 2))
