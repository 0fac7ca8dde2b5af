"""Linear attention with one decay a head and token, in torch operations: what ssd_scan and retention share.

S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t. Legend: B batch, L tokens, K size of q and k, V size of v,
C tokens of a chunk, S state (K, V), g log decay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of state and sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(x.dtype, torch.float32)


def per_head(matrix: Tensor, heads: int) -> Tensor:
    """Return (B, L, G, K) as (B, L, heads, K): each group serves heads / G heads in a row."""
    groups = matrix.shape[2]
    return matrix if groups == heads else matrix.repeat_interleave(heads // groups, dim=2)


def recurrent_linear_scan(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Walk the tokens one by one; return o (B, L, heads, V) and the last state (B, heads, K, V).

    Args:
        q: (B, L, heads, K).
        k: (B, L, heads, K).
        v: (B, L, heads, V).
        decay: factor of the state, exp(g), (B or 1, L or 1, heads).
        state: before the first token, (B, heads, K, V); None for zero.
    """
    if state is None:
        state = v.new_zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]))
    outputs = []
    factors = decay[..., None, None].expand(-1, v.shape[1], -1, -1, -1)
    # unbind rather than index: autograd of L indexed slices costs L full-size gradients
    for qt, kt, vt, a in zip(q.unbind(1), k.unbind(1), v.unbind(1), factors.unbind(1), strict=True):
        state = a * state + kt.unsqueeze(-1) * vt.unsqueeze(-2)
        outputs.append((qt.unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outputs, dim=1) if outputs else v), state


def _lower(x: Tensor) -> Tensor:
    """Return exp(x_i - x_j) for j <= i and 0 above the diagonal, (..., C, C) of x (..., C)."""
    above = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return (x.unsqueeze(-1) - x.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()


def chunked_linear_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Do the same by matrix products over chunks of tokens, without a loop; `chunk` = L is the quadratic form.

    Args:
        q: (B, L, heads, K).
        k: (B, L, heads, K).
        v: (B, L, heads, V).
        log_decay: g, (B or 1, L, heads).
        state: before the first token, (B, heads, K, V); None for zero.
        chunk: C.

    Returns:
        o, (B, L, heads, V), and the last state, (B, heads, K, V).

    Source: Mamba-2 (arXiv 2405.21060), section 6, and its listing 1.
    """
    seqlen = v.shape[1]
    chunk = min(chunk, seqlen)
    pad = -seqlen % chunk
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        log_decay = F.pad(log_decay, (0, 0, 0, pad))
    # (B, heads, chunks, C, K or V) and, for the decay, (B or 1, heads, chunks, C)
    q, k, v = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v))
    total = log_decay.transpose(1, 2).unflatten(2, (-1, chunk)).cumsum(-1)
    out = (q @ k.transpose(-1, -2) * _lower(total)) @ v
    # states[:, :, 0] is the one before the first token, the others what each chunk adds by its end
    added = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2) @ v
    states = F.pad(added, (0, 0, 0, 0, 1, 0))
    if state is not None:
        states = torch.cat([state.unsqueeze(2), added], dim=2)
    ends = F.pad(total[..., -1].cumsum(-1), (1, 0))  # (B or 1, heads, chunks + 1)
    starts = (_lower(ends) @ states.flatten(3)).unflatten(3, states.shape[3:])
    out = out + (q * total.exp().unsqueeze(-1)) @ starts[:, :, :-1]
    return out.flatten(2, 3)[:, :, :seqlen].transpose(1, 2), starts[:, :, -1]


def recurrence_flops(batch: int, seqlen: int, heads: int, dk: int, dv: int) -> int:
    """Return the FLOPs (2 x MACs) of the recurrence: k v^T and q S, each K V MACs a token and head."""
    return 4 * batch * seqlen * heads * dk * dv


def recurrence_bwd_flops(batch: int, seqlen: int, heads: int, dk: int, dv: int) -> int:
    """Return the FLOPs of its backward pass: the states again, their gradients, dq, dk and dv."""
    return 10 * batch * seqlen * heads * dk * dv
