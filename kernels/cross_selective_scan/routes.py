"""The four-direction scan as four routes of the routed scans, which the CPU and Triton backends call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUTES = (0, 1, 2, 3)


def arguments(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Any, ...]:
    """Return the routed scan's arguments, from those of the operator: views, where the pixels of a map allow it."""
    skips = None if D is None else list(D.unbind(0))
    biases = None if delta_bias is None else list(delta_bias.unbind(0))
    steps, b, c = (list(maps.flatten(3).unbind(1)) for maps in (delta, B, C))
    return (
        [x.flatten(2)],
        steps,
        list(A.unbind(0)),
        b,
        c,
        skips,
        None,
        biases,
        delta_softplus,
        ROUTES,
        x.shape[3],
    )


def gradients(g: Any, x: Tensor, ddelta: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Return the routed scan's gradients in the order of the operator's inputs.

    Args:
        g: gradients of the routes.
        x: the input, (B, D, H, W).
        ddelta: that of delta, (B, 4, D, H, W), where it is not in g.delta alone.
    """

    def together(parts: Any) -> Tensor:
        return torch.stack(list(parts), dim=1).unflatten(3, x.shape[2:])

    skips = None if g.D is None else torch.stack(list(g.D))
    biases = None if g.delta_bias is None else torch.stack(list(g.delta_bias))
    return (
        g.u[0].unflatten(2, x.shape[2:]),
        together(g.delta) if ddelta is None else ddelta,
        torch.stack(list(g.A)),
        together(g.B),
        together(g.C),
        skips,
        biases,
    )
