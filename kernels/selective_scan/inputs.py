"""Inputs of the selective scan: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vitzoo.kernels.common import native


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        dim: D.
        seqlen: L.
        dstate: N.
        groups: G; 0 for B and C without the group axis, -1 for constant ones, (D, N).
        has_D: with the skip term.
        has_z: with the gate.
        has_delta_bias: with a bias on delta.
        delta_softplus: with softplus on delta.
    """

    batch: int
    dim: int
    seqlen: int
    dstate: int
    groups: int = 0
    has_D: bool = True
    has_z: bool = True
    has_delta_bias: bool = True
    delta_softplus: bool = True


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 2, 3, 2),
    "one_token": Shape(2, 5, 1, 3),
    "one_state": Shape(3, 20, 33, 1, groups=4, has_z=False),
    "plain": Shape(2, 6, 19, 4, has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False),
    "odd": Shape(3, 37, 67, 5),
    "groups": Shape(2, 40, 50, 7, groups=2),
    "constant": Shape(2, 19, 35, 6, groups=-1),
    "wide_state": Shape(1, 18, 21, 64, has_z=False),
    "two_chunks": Shape(1, 17, 300, 3),
    "few_channels": Shape(1, 5, 1101, 3),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vim_small": Shape(8, 768, 197, 16),
    "vim_tiny_b1": Shape(1, 384, 197, 16),
    "few_channels": Shape(1, 16, 4096, 16),
    "vmamba_tiny_stage1": Shape(2, 768, 3136, 1, groups=4, has_z=False),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, with steps and rates as a trained Mamba has them.

    Args:
        shape: sizes and options.
        dtype: of u, delta, B, C and z; A, D and delta_bias have at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, dim, seqlen, dstate = shape.batch, shape.dim, shape.seqlen, shape.dstate
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    matrix: tuple[int, ...]
    if shape.groups < 0:
        matrix = (dim, dstate)
    else:
        matrix = (batch, *([shape.groups] if shape.groups else []), dstate, seqlen)
    delta = normal(batch, dim, seqlen)
    if not shape.delta_softplus:
        delta = delta.abs() * 0.3
    rates = torch.arange(1, dstate + 1, dtype=torch.float64) * torch.exp(
        0.1 * normal(dim, dstate, of=torch.float64).cpu()
    )
    return {
        "u": normal(batch, dim, seqlen),
        "delta": delta,
        "A": -rates.to(wide).to(device),
        "B": normal(*matrix),
        "C": normal(*matrix),
        "D": normal(dim, of=wide) if shape.has_D else None,
        "z": normal(batch, dim, seqlen) if shape.has_z else None,
        "delta_bias": normal(dim, of=wide) - 3 if shape.has_delta_bias else None,
        "delta_softplus": shape.delta_softplus,
    }


def floor_call(shape: Shape) -> Callable[[], None] | None:
    """Return a call that does what no scan on the CPU can do without: B D L N exponentials, and nothing else.

    It runs the polynomial of the C++ kernels in a bare loop over all cores. None without the extension.

    Args:
        shape: of the scan; the count is rounded up to whole work items, of 8192 exponentials on AVX2.
    """
    if native.why_not() is not None:
        return None
    each = torch.ops.vitzoo_native.scan_exponentials(0)
    items = -(-shape.batch * shape.dim * shape.seqlen * shape.dstate // each)
    return lambda: torch.ops.vitzoo_native.scan_exponentials(items)
