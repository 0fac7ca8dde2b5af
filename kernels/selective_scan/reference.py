"""Selective scan in plain PyTorch: the definition (Mamba, arXiv 2312.00752, equations 2 and 3, Algorithm 2).

Legend: B batch, D channels, L tokens, N state size, G groups of channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of state and sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(u.dtype, torch.float32)


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Return the step (B, D, L) in `dtype`: delta, plus its bias, through softplus."""
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    return F.softplus(step) if delta_softplus else step


def per_channel(matrix: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return B or C in any of its forms as (B or 1, D, L or 1, N)."""
    matrix = matrix.to(dtype)
    if matrix.ndim == 2:
        return matrix[None, :, None, :]
    if matrix.ndim == 3:
        matrix = matrix[:, None]
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1).transpose(2, 3)


def scan_states(decay: Tensor, drive: Tensor) -> list[Tensor]:
    """Return h_1 ... h_L, each (B, D, N), of h_t = decay_t h_{t-1} + drive_t from h_0 = 0."""
    h = decay.new_zeros(decay[:, :, :1].sum(2).shape)
    states = []
    # unbind rather than index: autograd of L indexed slices costs L full-size gradients
    for a, b in zip(decay.unbind(2), drive.unbind(2), strict=True):
        h = a * h + b
        states.append(h)
    return states


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (out, last_state); see `vitzoo.kernels.selective_scan` for shapes.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = sum_n C_t h_t + D u_t;  out = y silu(z).
    """
    dtype = compute_dtype(u)
    x, step = u.to(dtype), step_size(delta, delta_bias, delta_softplus, dtype)
    batch, dim, _ = u.shape
    b, c = per_channel(B, dim, dtype), per_channel(C, dim, dtype)
    decay = torch.exp(step.unsqueeze(-1) * A.to(dtype)[:, None, :])  # (B, D, L, N)
    drive = (step * x).unsqueeze(-1) * b  # (B, D, L, N)
    states = scan_states(decay, drive)
    rows = c.expand(-1, -1, len(states), -1).unbind(2)
    outputs = [(h * row).sum(-1) for h, row in zip(states, rows, strict=True)]
    y = torch.stack(outputs, dim=-1) if outputs else x
    last = states[-1] if states else x.new_zeros((batch, dim, A.shape[1]))
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), last


def _gradients_of_states(decay: Tensor, dout: Tensor, dlast: Tensor | None) -> Tensor:
    """Return dL/dh_t (B, D, L, N), given its direct part `dout` (B, D, L, N) and the last state's gradient."""
    carry = torch.zeros_like(decay[:, :, 0]) if dlast is None else dlast
    gradients = []
    for a, direct in zip(reversed(decay.unbind(2)), reversed(dout.unbind(2)), strict=True):
        g = direct + carry
        carry = a * g
        gradients.append(g)
    return torch.stack(gradients[::-1], dim=2)


def _sum_like(full: Tensor, matrix: Tensor) -> Tensor:
    """Sum a gradient (B, D, L, N) to the form of B or C."""
    if matrix.ndim == 2:
        return full.sum((0, 2))
    if matrix.ndim == 3:
        return full.sum(1).transpose(1, 2)
    return full.unflatten(1, (matrix.shape[1], -1)).sum(2).transpose(2, 3)


def selective_scan_reference_bwd(
    dout: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias, in the compute dtype; None for absent inputs.

    With g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1}, a_t = exp(delta_t A) and q_t = g_t a_t h_{t-1}:
    dA = sum_t q_t delta_t, ddelta_t = sum_n (q_t A + g_t B_t u_t), du_t = delta_t sum_n g_t B_t + D dy_t,
    dB_t = g_t delta_t u_t, dC_t = dy_t h_t.
    """
    dtype = compute_dtype(u)
    x, step = u.to(dtype), step_size(delta, delta_bias, delta_softplus, dtype)
    dim = u.shape[1]
    b, c, rate = per_channel(B, dim, dtype), per_channel(C, dim, dtype), A.to(dtype)
    decay = torch.exp(step.unsqueeze(-1) * rate[:, None, :])
    states = torch.stack(scan_states(decay, (step * x).unsqueeze(-1) * b), dim=2)  # (B, D, L, N)
    dy, dz, dD = dout.to(dtype), None, None
    if z is not None:
        gate = z.to(dtype)
        y = (states * c).sum(-1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x
        dz = torch.ops.aten.silu_backward(dy * y, gate)
        dy = dy * F.silu(gate)
    g = _gradients_of_states(decay, dy.unsqueeze(-1) * c, dlast)
    gb = (g * b).sum(-1)  # (B, D, L)
    q = g[:, :, 1:] * decay[:, :, 1:] * states[:, :, :-1]  # h before the first token is zero
    dA = (q * step[:, :, 1:, None]).sum((0, 2))
    ddelta = x * gb + F.pad((q * rate[:, None, :]).sum(-1), (1, 0))
    if delta_softplus:
        before = step_size(delta, delta_bias, False, dtype)
        ddelta = ddelta * torch.where(before > 20, 1.0, torch.sigmoid(before))
    du = step * gb
    if D is not None:
        du = du + D.to(dtype)[:, None] * dy
        dD = (dy * x).sum((0, 2))
    dB = _sum_like(g * (step * x).unsqueeze(-1), B)
    dC = _sum_like(states * dy.unsqueeze(-1), C)
    return du, ddelta, dA, dB, dC, dD, dz, ddelta.sum((0, 2)) if delta_bias is not None else None
