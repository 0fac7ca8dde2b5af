"""Inputs of the gated RMS norm: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call: all axes but the last, C, with a gate or not, and where the gate stands."""

    rows: tuple[int, ...]
    channels: int
    has_z: bool = True
    norm_before_gate: bool = False


SHAPES: dict[str, Shape] = {
    "one_row": Shape((1,), 3),
    "two_channels": Shape((2, 3), 2, norm_before_gate=True),
    "odd": Shape((3, 7), 37),
    "odd_before": Shape((3, 7), 37, norm_before_gate=True),
    "no_gate": Shape((2, 5), 48, has_z=False),
    "many_rows": Shape((3, 50), 21),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {"adventurer_base": Shape((8, 197), 1536)}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call.

    Args:
        shape: sizes and options.
        dtype: of x and z; the weight has at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    x = normal(*shape.rows, shape.channels)
    return {
        "x": x,
        "weight": 1 + 0.3 * normal(shape.channels, of=torch.promote_types(dtype, torch.float32)),
        "z": normal(*shape.rows, shape.channels) if shape.has_z else None,
        "eps": 1e-5,
        "norm_before_gate": shape.norm_before_gate,
    }
