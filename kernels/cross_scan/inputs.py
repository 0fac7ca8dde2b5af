"""Inputs of the cross-scan and cross-merge: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: B.
        channels: C.
        height: H.
        width: W.
    """

    batch: int
    channels: int
    height: int
    width: int


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 2, 2, 3),
    "pixel": Shape(2, 3, 1, 1),
    "row": Shape(1, 4, 1, 37),
    "column": Shape(1, 4, 33, 1),
    "odd": Shape(3, 5, 17, 35),
    "small_map": Shape(2, 3, 7, 14),
    "wide": Shape(2, 3, 16, 48),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vmamba_tiny_stage1": Shape(8, 96, 56, 56),
    "vmamba_tiny_stage3": Shape(8, 384, 14, 14),
}


def _normal(size: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call of `cross_scan`.

    Args:
        shape: sizes.
        dtype: of x.
        device: where.
        seed: of the random numbers.
    """
    size = (shape.batch, shape.channels, shape.height, shape.width)
    return {"x": _normal(size, dtype, device, seed)}


def make_cross_merge_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call of `cross_merge`; see `make_inputs`."""
    size = (shape.batch, 4, shape.channels, shape.height * shape.width)
    return {"y": _normal(size, dtype, device, seed), "H": shape.height, "W": shape.width}
