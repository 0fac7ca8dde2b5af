"""Attention of strided rows on the CPU in C++ (csrc/common/attention_cpu.cpp): allocates what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.common.attention.reference import compute_dtype

BLOCK = 64  # queries at once
# Work items that the backward pass aims at, no more than one image of a ViT-B has heads: each part of a head packs its
# keys and has gradients of keys and values of its own. These are added in a fixed order, so that the result does not
# depend on the number of threads.
BACKWARD_ITEMS = 12
# Elements of the two strips of scores, (keys, block), that the backward pass keeps: half a MiB of float32.
STRIP = 1 << 16


def why_not(q: Tensor | None = None, *args: object) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("q", q, "attention_with_scores_fwd", "pooled_attention_fwd", "attention_bwd")


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x if (x.dtype == torch.float64) == (dtype == torch.float64) else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_with_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, first_rows: Tensor, scores: Tensor
) -> None:
    """Write softmax(scale q k^T) v to `out`, the weights of query 0, and their mean over heads.

    Args:
        q: queries, (B, heads, L, head_dim), any strides.
        k: keys, (B, heads, keys, head_dim).
        v: values, likewise.
        scale: factor of the products.
        out: (B, heads, L, head_dim), a view with contiguous head_dim.
        first_rows: (B, heads, keys), contiguous, in the compute dtype.
        scores: (B, keys - 1), without the weight of key 0, contiguous, in the compute dtype.
    """
    rows = (_rows(x, q.dtype) for x in (q, k, v))
    torch.ops.vitzoo_native.attention_with_scores_fwd(*rows, scale, BLOCK, out, first_rows, scores)


def forward_of_maps(q: Tensor, kv: Tensor, num_heads: int, scale: float, out: Tensor) -> None:
    """Write softmax(scale q k^T) v to `out`, read from maps.

    Args:
        q: queries, (B, H, W, C), any strides.
        kv: keys and values, (B, h, w, 2*C), channels ordered (k, v) x head x head_dim.
        num_heads: heads.
        scale: factor of the products.
        out: (B, H, W, C), contiguous.
    """
    maps = (x if _in_line(x) else x.contiguous() for x in (q, _rows(kv, q.dtype)))
    torch.ops.vitzoo_native.pooled_attention_fwd(*maps, num_heads, scale, BLOCK, out)


def _in_line(x: Tensor) -> bool:
    """Return whether the rows of a map (B, H, W, C) follow one another in memory, its channels contiguous."""
    _, row, column, channel = x.stride()
    _, height, width, channels = x.shape
    return (channel == 1 or channels == 1) and (height == 1 or width == 1 or row == width * column)


def backward(
    dout: Tensor,
    dfirst_row: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients of q, k and v.

    Args:
        dout: gradient of the output, (B, heads, L, head_dim), any strides.
        dfirst_row: gradient of the weights of query 0, the same for every head, (B, keys), contiguous, in the compute
            dtype; or None.
        q: queries, as in `forward`.
        k: keys, likewise.
        v: values, likewise.
        scale: factor of the products.
        dq: (B, heads, L, head_dim), a view with contiguous head_dim.
        dk: likewise, (B, heads, keys, head_dim).
        dv: likewise.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    dtype = compute_dtype(q)
    block = max(16, min(BLOCK, STRIP // keys // 16 * 16))
    parts = min(-(-queries // block), -(-BACKWARD_ITEMS // (batch * heads)))
    dout, q, k, v = (_rows(x, q.dtype) for x in (dout, q, k, v))
    if parts == 1:
        partial = [dk, dv]
    else:
        partial = [torch.empty((parts * batch, *x.shape[1:]), dtype=dtype) for x in (dk, dv)]
    torch.ops.vitzoo_native.attention_bwd(dout, dfirst_row, q, k, v, scale, block, parts, dq, *partial)
    if parts > 1:
        for total, terms in zip((dk, dv), partial, strict=True):
            total.copy_(terms.unflatten(0, (parts, batch)).sum(0))
