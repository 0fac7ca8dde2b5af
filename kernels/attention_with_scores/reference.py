"""Attention with the class token's scores in plain PyTorch, the matrix formed."""

from __future__ import annotations

from torch import Tensor

from vitzoo.kernels.common.attention.reference import attend
from vitzoo.kernels.common.registration import backward_by_autograd


def attention_with_scores_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return out, (B, heads, L, head_dim), and scores, (B, L - 1), as `attention_with_scores` does."""
    out, attn = attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return out, attn[:, :, 0, 1:].mean(dim=1)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the operator's outputs: out is (B, L, heads, head_dim)."""
    out, scores = attention_with_scores_reference(q, k, v, scale)
    return out.transpose(1, 2), scores


def backward(dout: Tensor, dscores: Tensor | None, *inputs: object) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v."""
    return backward_by_autograd(forward, inputs, (dout, dscores), (0, 1, 2))
