"""Token reorganization on the CPU in C++ (csrc/reorganize_tokens): brings arguments to the form the kernels take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.reorganize_tokens.reference import compute_dtype


def why_not(x: Tensor | None = None, scores: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    if x is not None and scores is not None and scores.dtype == torch.float64 != x.dtype:
        return f"scores are torch.float64 and x is {x.dtype}: their order would be lost in float32"
    return native.cpu_why_not("x", x, "reorganize_tokens_fwd", "reorganize_tokens_bwd")


def token_count(length: int, keep: int, fuse: bool) -> int:
    """Return how many tokens a call gives, class token and fused one included."""
    return 1 + keep + int(fuse and keep < length - 1)


def forward(x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Return (tokens, indices)."""
    batch, length, channels = x.shape
    tokens = torch.empty((batch, token_count(length, keep, fuse), channels), dtype=x.dtype)
    indices = torch.empty((batch, keep), dtype=torch.int64)
    torch.ops.vitzoo_native.reorganize_tokens_fwd(
        x.contiguous(), scores.to(compute_dtype(x)).contiguous(), keep, fuse, tokens, indices
    )
    return tokens, indices


def backward(
    dtokens: Tensor, indices: Tensor, x: Tensor, scores: Tensor, keep: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and scores."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dscores = torch.empty(scores.shape, dtype=compute_dtype(x))
    torch.ops.vitzoo_native.reorganize_tokens_bwd(
        dtokens.contiguous(),
        indices,
        x.contiguous(),
        scores.to(compute_dtype(x)).contiguous(),
        keep,
        fuse,
        dx,
        dscores,
    )
    return dx, dscores
