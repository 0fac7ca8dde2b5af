"""Inputs of the bidirectional selective scan: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vitzoo.kernels.selective_scan import inputs as one_direction


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
        has_u_b: the second direction reads an input of its own.
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
    has_u_b: bool = True
    delta_softplus: bool = True


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 2, 3, 2),
    "one_token": Shape(2, 5, 1, 3),
    "plain": Shape(2, 6, 19, 4, has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False),
    "odd": Shape(3, 37, 67, 5),
    "shared_input": Shape(2, 20, 33, 1, has_u_b=False),
    "groups": Shape(2, 40, 50, 7, groups=2),
    "constant": Shape(2, 19, 35, 6, groups=-1),
    "two_chunks": Shape(1, 17, 300, 3),
    "few_channels": Shape(1, 5, 1101, 3),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vim_small": Shape(8, 768, 197, 16),
    "vim_tiny_b1": Shape(1, 384, 197, 16),
    "few_channels": Shape(1, 16, 4096, 16),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, with steps and rates as a trained Vim has them.

    Args:
        shape: sizes and options.
        dtype: of u, u_b, z, delta, B and C; A, D and delta_bias have at least float32.
        device: where.
        seed: of the random numbers.
    """
    sizes = one_direction.Shape(
        shape.batch,
        shape.dim,
        shape.seqlen,
        shape.dstate,
        shape.groups,
        shape.has_D,
        shape.has_z,
        shape.has_delta_bias,
        shape.delta_softplus,
    )
    ahead = one_direction.make_inputs(sizes, dtype, device, seed)
    back = one_direction.make_inputs(sizes, dtype, device, seed + 1)
    own = ("delta", "A", "B", "C", "D", "delta_bias")
    return {
        "u": ahead["u"],
        "z": ahead["z"],
        **{name: ahead[name] for name in own},
        **{f"{name}_b": back[name] for name in own},
        "u_b": back["u"] if shape.has_u_b else None,
        "delta_softplus": shape.delta_softplus,
    }
