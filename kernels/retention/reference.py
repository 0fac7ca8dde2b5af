"""Retention in plain PyTorch: the definition, in its three forms (RetNet, arXiv 2307.08621; ViR, arXiv 2310.19731).

Legend: B batch, L tokens, K size of q and k, V size of v, C tokens of a chunk, S state (K, V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.common.linear_scan import compute_dtype, recurrent_linear_scan

MODES = ("parallel", "recurrent", "chunkwise")


def powers(gammas: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gamma^n in `dtype` for every head and n, (heads, *exponents.shape); formed in float64."""
    shape = (-1, *(1 for _ in exponents.shape))
    return torch.pow(gammas.double().reshape(shape), exponents.double()).to(dtype)


def _chunk(q: Tensor, k: Tensor, v: Tensor, gammas: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return o and the state after a chunk, by the quadratic form; (B, heads, C, K or V) each."""
    count = q.shape[2]
    position = torch.arange(count, device=q.device)
    distance = position[:, None] - position[None, :]
    # the exponent is kept at 0 above the diagonal, where the mask decides
    mask = powers(gammas, distance.clamp(min=0), q.dtype).tril()  # (heads, C, C)
    out = (q @ k.transpose(-1, -2) * mask) @ v
    rest = powers(gammas, count - 1 - position, q.dtype).unsqueeze(-1)  # (heads, C, 1)
    end = (k * rest).transpose(-1, -2) @ v
    if state is not None:
        out = out + powers(gammas, position + 1, q.dtype).unsqueeze(-1) * (q @ state)
        end = end + powers(gammas, torch.full((1, 1), count, device=q.device), q.dtype) * state
    return out, end


def retention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gammas: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    mode: str = "recurrent",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return (out, final_state); see `vitzoo.kernels.retention` for shapes.

    S_t = gamma S_{t-1} + k_t v_t^T;  o_t = scale q_t S_t. In parallel: o = ((q k^T) * mask) v with
    mask_ij = gamma^(i-j) for j <= i, else 0; chunkwise: in parallel within a chunk, recurrent from chunk to chunk.
    """
    dtype = compute_dtype(q)
    rows = q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale)
    keys, values = k.to(dtype), v.to(dtype)
    state = None if initial_state is None else initial_state.to(dtype)
    if mode == "recurrent" or q.shape[1] == 0:
        decay = gammas.to(dtype)[None, None]
        out, state = recurrent_linear_scan(rows, keys, values, decay, state)
        return out.to(v.dtype), state
    length = max(1, q.shape[1]) if mode == "parallel" else chunk_size
    outputs = []
    chunks = zip(*(x.transpose(1, 2).split(length, dim=2) for x in (rows, keys, values)), strict=True)
    for a, b, c in chunks:
        out, state = _chunk(a, b, c, gammas, state)
        outputs.append(out)
    assert state is not None
    return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), state
