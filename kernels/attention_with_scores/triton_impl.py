"""Attention with the class token's scores in Triton: the rows of `common/attention/triton_impl.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.attention_with_scores.inputs import Shape, make_inputs
from vitzoo.kernels.common.attention import triton_impl as attention


def _rows(q: Tensor) -> Tensor:
    """Return (B, heads, L, head_dim), uninitialised, a view of (B, L, heads, head_dim)."""
    batch, heads, length, head_dim = q.shape
    return torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)


def _seen(x: Tensor) -> Tensor:
    """Return (B, heads, 1, L, head_dim) with contiguous head_dim."""
    return (x if x.stride(-1) == 1 else x.contiguous()).unsqueeze(2)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out, (B, L, heads, head_dim), and scores, (B, L - 1)."""
    out = _rows(q)
    first = attention.forward(attention.Call(_seen(q), _seen(k), _seen(v), scale), out.unsqueeze(2), True)
    return out.transpose(1, 2), first[:, :, 1:].mean(dim=1)


def backward(
    dout: Tensor, dscores: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dfirst = None if dscores is None else F.pad(dscores.float() / q.shape[1], (1, 0)).contiguous()
    gradients = (_rows(q), _rows(q), _rows(q))
    call = attention.Call(_seen(q), _seen(k), _seen(v), scale)
    dout = _seen(dout.to(q.dtype).transpose(1, 2))
    attention.backward(call, dout, dfirst, *(x.unsqueeze(2) for x in gradients))
    return gradients


def _ahead() -> tuple[object, ...]:
    found: tuple[object, ...] = ()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to("meta") for x in make_inputs(Shape(2, 6, 197, 64), dtype).values())
        scores = torch.empty((2, 196), device="meta")
        found += attention.launches(
            lambda q=q, k=k, v=v, scores=scores: (
                forward(q, k, v, 0.125),
                backward(q.transpose(1, 2), scores, q, k, v, 0.125),
            )
        )
    return found


AHEAD = _ahead()
