"""Inputs of the four-direction selective scan: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        dim: D.
        height: H.
        width: W.
        dstate: N.
        has_D: with the skip term.
        has_delta_bias: with a bias on delta.
        delta_softplus: with softplus on delta.
    """

    batch: int
    dim: int
    height: int
    width: int
    dstate: int
    has_D: bool = True
    has_delta_bias: bool = True
    delta_softplus: bool = True


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 2, 2, 3, 2),
    "pixel": Shape(2, 3, 1, 1, 2),
    "row": Shape(1, 5, 1, 19, 1),
    "plain": Shape(2, 6, 5, 4, 3, has_D=False, has_delta_bias=False, delta_softplus=False),
    "odd": Shape(3, 19, 9, 7, 5),
    "two_chunks": Shape(1, 17, 18, 17, 1),
    "few_channels": Shape(1, 5, 31, 37, 3),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vmamba_tiny_stage1": Shape(2, 96, 56, 56, 1),
    "vmamba_tiny_stage3": Shape(2, 384, 14, 14, 1),
    "vanilla_vmamba_tiny_stage3": Shape(2, 768, 14, 14, 16),
    "few_channels": Shape(1, 16, 64, 64, 16),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, with steps and rates as a trained VMamba has them.

    Args:
        shape: sizes and options.
        dtype: of x, delta, B and C; A, D and delta_bias have at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    size = (shape.height, shape.width)

    def normal(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    delta = normal(shape.batch, 4, shape.dim, *size)
    if not shape.delta_softplus:
        delta = delta.abs() * 0.3
    rates = torch.exp(0.1 * normal(4, shape.dim, shape.dstate, of=wide))
    return {
        "x": normal(shape.batch, shape.dim, *size),
        "delta": delta,
        "A": -rates * torch.arange(1, shape.dstate + 1, dtype=wide, device=device),
        "B": normal(shape.batch, 4, shape.dstate, *size),
        "C": normal(shape.batch, 4, shape.dstate, *size),
        "D": normal(4, shape.dim, of=wide) if shape.has_D else None,
        "delta_bias": normal(4, shape.dim, of=wide) - 3 if shape.has_delta_bias else None,
        "delta_softplus": shape.delta_softplus,
    }
