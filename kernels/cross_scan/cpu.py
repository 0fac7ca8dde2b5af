"""Cross-scan and cross-merge on the CPU in C++ (csrc/cross_scan). Each is the other's backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("the input", x, "cross_scan", "cross_merge")


def scan(x: Tensor) -> Tensor:
    """Return the four sequences of a map; one that is not contiguous is copied once."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, 4, channels, height * width), dtype=x.dtype)
    torch.ops.vitzoo_native.cross_scan(x.contiguous(), out)
    return out


def merge(y: Tensor, H: int, W: int) -> Tensor:
    """Return the map that the four sequences add up to; y that is not contiguous is copied once."""
    out = torch.empty((y.shape[0], y.shape[2], H, W), dtype=y.dtype)
    torch.ops.vitzoo_native.cross_merge(y.contiguous(), out)
    return out


def scan_backward(dout: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x."""
    return merge(dout, x.shape[2], x.shape[3])


def merge_backward(dout: Tensor, y: Tensor, H: int, W: int) -> Tensor:
    """Return the gradient of y."""
    return scan(dout)
