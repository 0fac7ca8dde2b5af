"""Convolution layers.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d


@register_notrace_module
class DeformConv2d(nn.Module):
    """Convolve without overlap at positions that the input itself displaces (DCN v1).

    An ordinary convolution of the same kernel and stride, `conv_offset`, gives a displacement in pixels to
    each tap of each output. Samples are bilinear; outside the map there are zeros. Displacements start at
    zero, so that a new layer is an ordinary convolution.

    Offsets and samples are computed in float32 at least, with autocast off: in bfloat16 a position has 8
    bits, and CPU has no kernel for it.

    Args:
        in_chans: input channels C.
        out_chans: output channels.
        kernel_size: kernel and stride.

    Source: Dai et al., Deformable Convolutional Networks, arXiv 1703.06211, section 2.1.
    """

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int = 2, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(out_chans, in_chans, kernel_size, kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(out_chans, **dd))
        # channel 2k is the row displacement of tap k (row-major), channel 2k + 1 its column displacement
        self.conv_offset = nn.Conv2d(in_chans, 2 * kernel_size**2, kernel_size, stride=kernel_size, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Conv2d` does and set the displacements to zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def offsets(self, x: Tensor) -> Tensor:
        """Return the displacements.

        Args:
            x: map, (B, C, H, W).

        Returns:
            (B, 2*kernel_size**2, H // kernel_size, W // kernel_size), in pixels, (row, column) pairs; float32
            at least.

        Raises:
            ValueError: the map is smaller than the kernel.
        """
        height, width = x.shape[2:]
        if min(height, width) < self.kernel_size:
            raise ValueError(
                f"a {height}x{width} map is smaller than the kernel, {self.kernel_size}: pass a larger image"
            )
        with _without_autocast(x.device.type):
            return F.conv2d(
                _widened(x),
                _widened(self.conv_offset.weight),
                _widened(cast(Tensor, self.conv_offset.bias)),
                stride=self.kernel_size,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: map, (B, C, H, W).

        Returns:
            (B, out_chans, H // kernel_size, W // kernel_size), dtype of `x`.

        Raises:
            ValueError: the map is smaller than the kernel.
        """
        offsets = self.offsets(x)
        with _without_autocast(x.device.type):
            out = deform_conv2d(
                _widened(x), offsets, _widened(self.weight), _widened(self.bias), stride=self.kernel_size
            )
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """Say the sizes."""
        out_chans, in_chans = self.weight.shape[:2]
        return f"{in_chans}, {out_chans}, kernel_size={self.kernel_size}"


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # the meta device has no autocast to switch off
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
