"""local_attention on the CPU in C++ (csrc/local_attention): brings the arguments to the form the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native

WORK_ITEMS = 32  # aimed at


def why_not(q: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("q", q, "local_attention_fwd", "local_attention_bwd")


def _images(x: Tensor) -> Tensor:
    """Return x with contiguous images; a slice of the channels of a larger tensor goes as it is."""
    height, width = x.shape[2:]
    expected = (height * width, width, 1)
    fits = all(n == 1 or s == e for n, s, e in zip(x.shape[1:], x.stride()[1:], expected, strict=True))
    return x if fits else x.contiguous()


def _block_rows(q: Tensor, num_heads: int) -> int:
    """Return rows of a work item: a function of the shape alone, and so is the result."""
    heads, height = q.shape[0] * num_heads, q.shape[2]
    blocks = max(-(-height // 8), min(height // 2, WORK_ITEMS // heads), 1)
    return -(-height // blocks)


def _options(
    q: Tensor, kernel_size: Sequence[int], dilation: int, scale: float, num_heads: int
) -> tuple[Any, ...]:
    return (*kernel_size, dilation, scale, num_heads, _block_rows(q, num_heads))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    dilation: int,
    scale: float,
    num_heads: int,
) -> Tensor:
    """Return the output."""
    out = torch.empty(q.shape, dtype=q.dtype)
    options = _options(q, kernel_size, dilation, scale, num_heads)
    torch.ops.vitzoo_native.local_attention_fwd(_images(q), _images(k), _images(v), *options, out)
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    dilation: int,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, _, height, width = q.shape
    shape = (batch, num_heads, kernel_size[0] * kernel_size[1], height, width)
    weights, dscores = (torch.empty(shape, dtype=dtype) for _ in range(2))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    torch.ops.vitzoo_native.local_attention_bwd(
        *(_images(x) for x in (dout.to(q.dtype), q, k, v)),
        *_options(q, kernel_size, dilation, scale, num_heads),
        *(weights, dscores, dq, dk, dv),
    )
    return dq, dk, dv
