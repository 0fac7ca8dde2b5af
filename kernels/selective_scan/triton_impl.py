"""Selective scan in Triton: one route of the kernels in `common/scan_kernels.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import scan_triton


def _listed(x: Tensor | None) -> list[Tensor] | None:
    return None if x is None else [x]


def _arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Any, ...]:
    skip, bias = _listed(D), _listed(delta_bias)
    return [u], [delta], [A], [B], [C], skip, z, bias, delta_softplus, (0,), u.shape[2]


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Return (out, last_state); inputs as in the operator's schema."""
    out, last_state = scan_triton.forward(*_arguments(*inputs), want_last=True)
    assert last_state is not None
    return out, last_state


def backward(dout: Tensor, dlast: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; None for absent inputs."""
    g = scan_triton.backward(dout, dlast, *_arguments(*inputs))
    return (
        g.u[0],
        g.delta[0],
        g.A[0],
        g.B[0],
        g.C[0],
        None if g.D is None else g.D[0],
        g.z,
        None if g.delta_bias is None else g.delta_bias[0],
    )


def __getattr__(name: str) -> Any:
    """Make AHEAD, what to compile ahead of time, when it is asked for."""
    if name != "AHEAD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitzoo.kernels.selective_scan.inputs import Shape, make_inputs

    shapes = (
        Shape(2, 64, 300, 16),  # enough programs to walk the chunks in turn
        Shape(1, 8, 300, 16),  # all chunks at once
        Shape(2, 64, 300, 1, groups=4, has_z=False),
        Shape(8, 64, 300, 16, groups=-1, has_D=False, has_delta_bias=False, delta_softplus=False),
    )
    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            tensors = make_inputs(shape, dtype)
            k = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in tensors.items()}
            order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
            found += _launches(tuple(k[n] for n in order))
    return tuple(found)


def _launches(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    u, A = inputs[0], inputs[2]
    dlast = torch.empty(u.shape[0], u.shape[1], A.shape[1], device="meta")
    return scan_triton.launches(lambda: (forward(*inputs), backward(u, dlast, *inputs)))
