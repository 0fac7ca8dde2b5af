"""The bidirectional scan as two routes of the routed scans, which the CPU and Triton backends call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ROUTES = (0, 2)


def _pair(x: Tensor | None, other: Tensor | None) -> list[Tensor] | None:
    return None if x is None or other is None else [x, other]


def arguments(
    u: Tensor,
    z: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    u_b: Tensor | None,
    delta_softplus: bool,
) -> tuple[Any, ...]:
    """Return the routed scan's arguments, from those of the operator."""
    inputs = [u] if u_b is None else [u, u_b]
    skips, biases = _pair(D, D_b), _pair(delta_bias, delta_bias_b)
    matrices = [A, A_b], [B, B_b], [C, C_b]
    return inputs, [delta, delta_b], *matrices, skips, z, biases, delta_softplus, ROUTES, u.shape[2]


def gradients(g: Any) -> tuple[Tensor | None, ...]:
    """Return the routed scan's gradients in the order of the operator's inputs."""
    skips = (None, None) if g.D is None else g.D
    biases = (None, None) if g.delta_bias is None else g.delta_bias
    ahead, back = ((g.delta[r], g.A[r], g.B[r], g.C[r], skips[r], biases[r]) for r in (0, 1))
    return g.u[0], g.z, *ahead, *back, g.u[1] if len(g.u) > 1 else None
