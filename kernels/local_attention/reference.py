"""local_attention in plain PyTorch: the definition (TiC, arXiv 2310.04134), one window position at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.registration import backward_by_autograd


def shifts(x: Tensor, kernel_size: int | Sequence[int], dilation: int) -> Iterator[Tensor]:
    """Yield x (..., H, W) as each window position sees it, rows first, zero beyond the map."""
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    height, width = x.shape[-2:]
    rows, columns = dilation * (kh - 1) // 2, dilation * (kw - 1) // 2
    padded = F.pad(x, (columns, columns, rows, rows))
    for i in range(kh):
        for j in range(kw):
            y0, x0 = i * dilation, j * dilation
            yield padded[..., y0 : y0 + height, x0 : x0 + width]


def local_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int = 1,
    scale: float = 1.0,
    num_heads: int = 1,
) -> Tensor:
    """Return sum_p softmax_p(scale q . k_p) v_p over the window positions p; see `op.local_attention`.

    Zeros beyond the map are keys and values like any other. Computed in at least float32.

    Args:
        q: (B, C, H, W).
        k: (B, C, H, W).
        v: (B, C, H, W).
        kernel_size: (kh, kw), odd, or one number for both.
        dilation: between window positions.
        scale: of the logits.
        num_heads: groups of neighbouring channels that attend by themselves.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = [x.to(dtype).unflatten(1, (num_heads, x.shape[1] // num_heads)) for x in (q, k, v)]
    query, key, value = heads  # (B, heads, C / heads, H, W)
    logits = torch.stack([(query * shifted).sum(2) for shifted in shifts(key, kernel_size, dilation)], dim=2)
    attn = (scale * logits).softmax(2)  # (B, heads, kh kw, H, W)
    out = torch.zeros_like(value)
    for p, shifted in enumerate(shifts(value, kernel_size, dilation)):
        out = out + attn[:, :, p, None] * shifted
    return out.flatten(1, 2).to(q.dtype)


def local_attention_reference_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    dilation: int,
    scale: float,
    num_heads: int,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v."""
    inputs = (q, k, v, kernel_size, dilation, scale, num_heads)
    return backward_by_autograd(local_attention_reference, inputs, (dout,), (0, 1, 2))
