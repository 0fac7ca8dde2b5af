"""Inputs of tv_conv2d: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        channels: C.
        height: H, of x.
        width: W, of x.
        side: k.
        stride: of both axes.
        has_bias: with a bias map.
    """

    batch: int
    channels: int
    height: int
    width: int
    side: int = 3
    stride: int = 1
    has_bias: bool = False


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 1, 1, 1),
    "odd": Shape(3, 5, 7, 19, has_bias=True),
    "pointwise": Shape(2, 3, 4, 5, side=1, has_bias=True),
    "wide_kernel": Shape(1, 2, 9, 33, side=5, has_bias=True),
    "widest_kernel": Shape(2, 1, 5, 4, side=7),
    "stride_2": Shape(2, 4, 12, 10, stride=2, has_bias=True),
    "stride_2_odd": Shape(1, 3, 11, 37, side=5, stride=2),
    "stride_3": Shape(2, 2, 10, 8, stride=3),
    "stride_beyond_kernel": Shape(1, 2, 9, 9, side=1, stride=2),
    "many_images": Shape(19, 2, 6, 6, has_bias=True),
    "many_channels": Shape(1, 34, 5, 17),
}
# TVConv's MobileNetV2 x1.0 on 96 x 96 faces.
MODEL_SHAPES: dict[str, Shape] = {
    "tvconv_mobilenetv2_features1": Shape(8, 32, 96, 96),
    "tvconv_mobilenetv2_features2": Shape(8, 96, 96, 96, stride=2),
    "tvconv_mobilenetv2_features8": Shape(8, 384, 12, 12),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call.

    Args:
        shape: sizes and options.
        dtype: of every tensor.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    out = tuple((size - 1) // shape.stride + 1 for size in (shape.height, shape.width))
    return {
        "x": normal(shape.batch, shape.channels, shape.height, shape.width),
        "weight": normal(shape.channels, shape.side**2, *out),
        "bias": normal(shape.channels, *out) if shape.has_bias else None,
        "stride": shape.stride,
    }


def unfold_tv_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Return the same convolution by the paper's formulation: x unfolded to (B, C k k, H W) times the weight."""
    side = math.isqrt(weight.shape[1])
    columns = F.unfold(x, side, padding=(side - 1) // 2, stride=stride)
    out = (columns.reshape(x.shape[0], *weight.shape) * weight).sum(2)
    return out if bias is None else out + bias


# What the speed of the operator is measured against.
BASELINES: dict[str, Callable[..., Tensor]] = {"unfold formulation": unfold_tv_conv2d}
