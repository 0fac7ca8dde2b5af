"""Inputs of the residual norms: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        rows: all axes but the last.
        channels: C.
        has_residual: False in a network's first block.
        has_bias: of the layer norm.
        wide_residual: the residual has float32 or float64 whatever x has, as a stream does.
    """

    rows: tuple[int, ...]
    channels: int
    has_residual: bool = True
    has_bias: bool = True
    wide_residual: bool = True


SHAPES: dict[str, Shape] = {
    "one_row": Shape((1,), 3),
    "two_channels": Shape((2, 3), 2),
    "odd": Shape((3, 7), 37),
    "first_block": Shape((2, 5), 48, has_residual=False, has_bias=False),
    "narrow_residual": Shape((3, 2, 3), 66, wide_residual=False),
    "many_rows": Shape((3, 50), 21),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vim_small": Shape((8, 197), 384),
    "vim_tiny_b1": Shape((1, 197), 192),
}


def make_add_rms_norm_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call of add_rms_norm.

    Args:
        shape: sizes and options.
        dtype: of x; the weight has at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = wide) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    x = normal(*shape.rows, shape.channels, of=dtype)
    stream = wide if shape.wide_residual else dtype
    residual = normal(*shape.rows, shape.channels, of=stream) + 0.5
    return {
        "x": x,
        "residual": residual if shape.has_residual else None,
        "weight": 1 + 0.3 * normal(shape.channels),
        "eps": 1e-5,
    }


def make_add_layer_norm_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call of add_layer_norm; see `make_add_rms_norm_inputs`."""
    inputs = make_add_rms_norm_inputs(shape, dtype, device, seed)
    bias = 0.1 * inputs["weight"].flip(0) if shape.has_bias else None
    return inputs | {"bias": bias}
