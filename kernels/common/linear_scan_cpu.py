"""Linear attention with one decay a head and token on the CPU in C++ (csrc/common/linear_scan.cpp).

Large tensors go as they are, in their dtype and with their strides, as long as the last dimension is contiguous; the
small ones go in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.common.linear_scan import compute_dtype

CHUNK = 64  # tokens, kChunk in C++
# Work items aimed at when the heads that share B and C are cut up, and those below which the chunks of a sequence are
# worked on side by side. Both look at the shape alone: the result does not depend on the number of threads.
SHARED_ITEMS = 16
ENOUGH_ITEMS = 64


def why_not(x: Tensor | None, name: str) -> str | None:
    """Return why the C++ kernels cannot take a call whose first input, `name`, is x, or None."""
    return native.cpu_why_not(name, x, "linear_scan_fwd", "linear_scan_bwd")


@dataclass(frozen=True)
class Call:
    """The arguments of one recurrence; see csrc/common/linear_scan.h for the mathematics.

    Attributes:
        q, k: (B, L, G, K).
        v: (B, L, heads, V).
        dt: (B, L, heads), or None for steps of 1.
        rate: log decay of a step of 1, (heads,).
        dt_bias: (heads,).
        dt_softplus: softplus on dt.
        D: (heads,) or (heads, V).
        z: (B, L, heads, V).
        initial_state: (B, heads, K, V).
        scale: factor of q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    dt: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    D: Tensor | None = None
    z: Tensor | None = None
    initial_state: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs of a `Call`; None for absent ones. dq and dk, (B, L, G, K), have the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    dt: Tensor | None
    D: Tensor | None
    z: Tensor | None
    initial_state: Tensor


def _padded(size: int) -> int:
    return -(-size // 16) * 16


def _rows(x: Tensor, v: Tensor) -> Tensor:
    """Return x as the kernels take it: rows contiguous, float64 exactly when v is."""
    if (x.dtype == torch.float64) != (v.dtype == torch.float64):
        x = x.to(compute_dtype(v))
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _state(call: Call, initial: Tensor | None) -> Tensor:
    """Return a state as the kernels keep it: (B, heads, K, V) padded with zeros to whole vectors."""
    batch, _, heads, dv = call.v.shape
    dk, dtype = call.q.shape[3], compute_dtype(call.v)
    state = torch.zeros((batch, heads, _padded(dk), _padded(dv)), dtype=dtype)
    if initial is not None:
        state[..., :dk, :dv] = initial
    return state


def _cut(call: Call) -> tuple[int, int]:
    """Return the heads of a group that one work item takes, and how many chunks are worked on side by side."""
    batch, seqlen, heads, _ = call.v.shape
    groups = call.q.shape[2]
    of_group = heads // groups
    part_heads = -(-of_group // min(of_group, -(-SHARED_ITEMS // (batch * groups))))
    items = batch * groups * -(-of_group // part_heads)
    chunks = -(-seqlen // CHUNK)
    return part_heads, 1 if items >= ENOUGH_ITEMS else min(chunks, -(-ENOUGH_ITEMS // items))


def _arguments(call: Call) -> tuple[object, ...]:
    v, dtype = call.v, compute_dtype(call.v)

    def small(x: Tensor | None, to: torch.dtype = dtype) -> Tensor | None:
        return None if x is None else x.to(to).contiguous()

    return (
        _rows(call.q, v),
        _rows(call.k, v),
        _rows(v, v),
        None if call.dt is None else call.dt.to(dtype) if _mixed(call.dt, v) else call.dt,
        small(call.rate, torch.float64),
        small(call.dt_bias),
        call.dt_softplus,
        small(call.D),
        None if call.z is None else _rows(call.z, v),
        call.initial_state is not None,
        call.scale,
        *_cut(call),
    )


def _mixed(x: Tensor, v: Tensor) -> bool:
    return (x.dtype == torch.float64) != (v.dtype == torch.float64)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return out, (B, L, heads, V), and the last state, (B, heads, K, V), a view."""
    out = torch.empty(call.v.shape, dtype=call.v.dtype)
    state = _state(call, call.initial_state)
    torch.ops.vitzoo_native.linear_scan_fwd(*_arguments(call), out, state)
    return out, state[..., : call.q.shape[3], : call.v.shape[3]]


def backward(call: Call, dout: Tensor, dstate: Tensor | None) -> Gradients:
    """Return the gradients, given those of out and of the last state."""
    batch, seqlen, heads, dv_size = call.v.shape
    groups, dk_size, dtype = call.q.shape[2], call.q.shape[3], compute_dtype(call.v)
    arguments = _arguments(call)
    chunks = -(-seqlen // CHUNK)

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of)

    dq, dk = (empty(batch, seqlen, groups, dk_size) for _ in range(2))
    dv = empty(*call.v.shape, of=call.v.dtype)
    ddt = None if call.dt is None else empty(batch, seqlen, heads)
    drate = empty(batch, chunks, heads)
    dD = None if call.D is None else empty(batch, chunks, heads, dv_size)
    dz = None if call.z is None else empty(*call.v.shape, of=arguments[8].dtype)  # type: ignore[attr-defined]
    gradient = _state(call, dstate)
    torch.ops.vitzoo_native.linear_scan_bwd(
        _rows(dout, call.v),
        *arguments,
        _state(call, call.initial_state),
        gradient,
        *(dq, dk, dv, ddt, drate, dD, dz),
    )
    if dD is not None and call.D is not None:
        dD = dD.sum((0, 1) if call.D.ndim == 2 else (0, 1, 3))
    return Gradients(
        q=dq,
        k=dk,
        v=dv,
        rate=drate.sum((0, 1)),
        dt=ddt,
        D=dD,
        z=dz,
        initial_state=gradient[..., :dk_size, :dv_size],
    )
