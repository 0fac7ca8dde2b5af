"""Pooled attention in Triton: the rows of `common/attention/triton_impl.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.common.attention import triton_impl as attention
from vitzoo.kernels.pooled_attention.inputs import Shape, make_inputs
from vitzoo.kernels.pooled_attention.reference import split_heads


def _call(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> attention.Call:
    q, kv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv))
    return attention.Call(*(x.unsqueeze(2) for x in split_heads(q, kv, num_heads)), scale)


def forward(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Return the attention's output, (B, H, W, C)."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attention.forward(_call(q, kv, num_heads, scale), split_heads(out, kv, num_heads)[0].unsqueeze(2))
    return out


def backward(dout: Tensor, q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and kv."""
    dq, dkv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, kv))
    dout = split_heads(dout.to(q.dtype).contiguous(), kv, num_heads)[0].unsqueeze(2)
    written = (x.unsqueeze(2) for x in split_heads(dq, dkv, num_heads))
    attention.backward(_call(q, kv, num_heads, scale), dout, None, *written)
    return dq, dkv


def _ahead() -> tuple[object, ...]:
    found: tuple[object, ...] = ()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (Shape(2, 14, 14, 7, 7, 10, 32), Shape(2, 8, 8, 4, 4, 2, 128)):
            q, kv, heads = (
                x.to("meta") if isinstance(x, Tensor) else x for x in make_inputs(shape, dtype).values()
            )
            found += attention.launches(
                lambda q=q, kv=kv, heads=heads: (forward(q, kv, heads, 0.1), backward(q, q, kv, heads, 0.1))
            )
    return found


AHEAD = _ahead()
