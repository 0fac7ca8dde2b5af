"""Inputs of retention: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vitzoo.kernels.retention.reference import retention_reference


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        seqlen: L.
        heads: heads.
        dk: K.
        dv: V.
        has_state: with an initial state.
        mode: the form.
        chunk_size: tokens of a chunk in the chunkwise form.
    """

    batch: int
    seqlen: int
    heads: int
    dk: int
    dv: int
    has_state: bool = False
    mode: str = "chunkwise"
    chunk_size: int = 64


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 3, 2, 2, 2, has_state=True, chunk_size=2),
    "one_token": Shape(2, 1, 3, 5, 3, has_state=True),
    "odd": Shape(3, 67, 5, 19, 21, chunk_size=9),
    "two_chunks": Shape(1, 131, 3, 33, 17, has_state=True),
    "parallel": Shape(2, 35, 2, 8, 11, has_state=True, mode="parallel"),
    "recurrent": Shape(2, 20, 2, 7, 4, has_state=True, mode="recurrent"),
    "many_heads": Shape(4, 70, 20, 6, 8, has_state=True),
}
# The models' own sizes, for benchmarks: 196 patches and the class token.
MODEL_SHAPES: dict[str, Shape] = {
    "vir_small_b1": Shape(1, 197, 6, 64, 64),
    "vir_small": Shape(8, 197, 6, 64, 64),
    "vir_base": Shape(8, 197, 12, 64, 64),
    "vir_large": Shape(8, 197, 16, 64, 64),
    "vir_small_1024": Shape(1, 4097, 6, 64, 64),
}


def _form(mode: str) -> Callable[..., Any]:
    @functools.wraps(retention_reference)
    def baseline(**inputs: Any) -> Any:
        return retention_reference(**{**inputs, "mode": mode})

    return baseline


BASELINES: dict[str, Callable[..., Any]] = {
    "recurrent torch operations": _form("recurrent"),
    "parallel torch operations": _form("parallel"),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, with the decays of ViR.

    Args:
        shape: sizes and options.
        dtype: of q, k and v; gammas and the initial state have at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    rows = (shape.batch, shape.seqlen, shape.heads)
    ends = (math.log(1 / 32), math.log(1 / 512))
    gammas = 1 - torch.exp(torch.linspace(*ends, shape.heads, dtype=torch.float64))
    return {
        "q": normal(*rows, shape.dk),
        "k": normal(*rows, shape.dk),
        "v": normal(*rows, shape.dv),
        "gammas": gammas.to(wide).to(device),
        "initial_state": normal(shape.batch, shape.heads, shape.dk, shape.dv, of=wide)
        if shape.has_state
        else None,
        "mode": shape.mode,
        "chunk_size": shape.chunk_size,
    }
