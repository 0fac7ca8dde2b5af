"""Inputs of the token reorganization: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        length: L, with the class token.
        channels: C.
        keep: K.
        fuse: with a fused token.
    """

    batch: int
    length: int
    channels: int
    keep: int
    fuse: bool = True


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 3, 2, 1),
    "keeps_all": Shape(2, 5, 7, 4),
    "unfused": Shape(3, 17, 19, 11, fuse=False),
    "odd": Shape(3, 38, 37, 21),
    "keeps_one": Shape(2, 23, 48, 1),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "evit_small_keep0.7": Shape(8, 197, 384, 138),
    "evit_small_keep0.5_b64": Shape(64, 197, 384, 98),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call; the scores are positive, in float32 at least.

    Args:
        shape: sizes and options.
        dtype: of x.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scores = normal(shape.batch, shape.length - 1).softmax(dim=1)
    return {
        "x": normal(shape.batch, shape.length, shape.channels).to(dtype).to(device),
        # rounded first, so that float32 and float64 hold the same order
        "scores": scores.float().to(wide).to(device),
        "keep": shape.keep,
        "fuse": shape.fuse,
    }
