"""Inputs of the Mamba-2 scan: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vitzoo.kernels.ssd_scan.reference import ssd_scan_chunked


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        seqlen: L.
        heads: heads.
        headdim: P.
        dstate: N.
        groups: G, a divisor of heads.
        skip: 0 without D, 1 for D of (heads,), 2 for D of (heads, P).
        has_z: with the gate.
        has_dt_bias: with a bias on dt.
        dt_softplus: softplus on dt.
    """

    batch: int
    seqlen: int
    heads: int
    headdim: int
    dstate: int
    groups: int = 1
    skip: int = 1
    has_z: bool = False
    has_dt_bias: bool = True
    dt_softplus: bool = True


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 3, 2, 2, 2),
    "one_token": Shape(2, 1, 3, 5, 3),
    "one_state": Shape(3, 33, 4, 7, 1, groups=2, has_z=True),
    "plain": Shape(2, 19, 6, 4, 5, groups=3, skip=0, has_dt_bias=False, dt_softplus=False),
    "odd": Shape(3, 67, 5, 19, 21, has_z=True, skip=2),
    "two_chunks": Shape(1, 131, 3, 17, 33, groups=3, has_z=True),
    "many_heads": Shape(2, 70, 40, 8, 6, groups=2, skip=2),
}
# The models' own sizes, for benchmarks: 196 patches, the class token and the mean token of Adventurer.
MODEL_SHAPES: dict[str, Shape] = {
    "adventurer_tiny_b1": Shape(1, 198, 8, 64, 64),
    "adventurer_tiny": Shape(8, 198, 8, 64, 64),
    "adventurer_small": Shape(8, 198, 16, 64, 64),
    "adventurer_base": Shape(8, 198, 24, 64, 64),
    "adventurer_tiny_patch4": Shape(1, 3138, 8, 64, 64),
}
BASELINES: dict[str, Callable[..., Any]] = {"chunked torch operations": ssd_scan_chunked}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, with steps and rates as a trained Mamba-2 has them.

    Args:
        shape: sizes and options.
        dtype: of x, dt, B, C and z; A, D and dt_bias have at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    tokens = (shape.batch, shape.seqlen)
    rows = (*tokens, shape.heads, shape.headdim)
    dt = normal(*tokens, shape.heads)
    if not shape.dt_softplus:
        dt = dt.abs() * 0.3
    skip = (shape.heads, shape.headdim)[: shape.skip]
    return {
        "x": normal(*rows),
        "dt": dt,
        "A": -torch.exp(normal(shape.heads, of=wide)),
        "B": normal(*tokens, shape.groups, shape.dstate),
        "C": normal(*tokens, shape.groups, shape.dstate),
        "D": normal(*skip, of=wide) if shape.skip else None,
        "z": normal(*rows) if shape.has_z else None,
        "dt_bias": normal(shape.heads, of=wide) - 3 if shape.has_dt_bias else None,
        "dt_softplus": shape.dt_softplus,
    }
