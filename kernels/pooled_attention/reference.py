"""Pooled attention in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from vitzoo.kernels.common.attention.reference import attend
from vitzoo.kernels.common.registration import backward_by_autograd


def split_heads(q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, heads, H*W, head_dim), and k and v (B, heads, h*w, head_dim), views where the strides allow."""
    batch, head_dim = q.shape[0], q.shape[3] // num_heads
    rows = q.reshape(batch, q.shape[1] * q.shape[2], num_heads, head_dim)
    pairs = kv.reshape(batch, kv.shape[1] * kv.shape[2], 2, num_heads, head_dim)
    return rows.transpose(1, 2), pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2)


def pooled_attention_reference(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Return (B, H, W, C), the dtype of q; the arguments are those of `pooled_attention`."""
    rows, k, v = split_heads(q, kv, num_heads)
    scale = rows.shape[-1] ** -0.5 if scale is None else scale
    return attend(rows, k, v, scale)[0].transpose(1, 2).reshape(q.shape)


def pooled_attention_reference_bwd(dout: Tensor, *inputs: object) -> tuple[Tensor | None, ...]:
    """Return the gradients of q and kv."""
    return backward_by_autograd(pooled_attention_reference, inputs, (dout,), (0, 1))
