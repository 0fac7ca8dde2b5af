"""Token reorganization in plain PyTorch: the definition (EViT, arXiv 2202.07800, section 3.2, equation 4).

Legend: B batch, L tokens with the class token in front, C channels, K tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the fused token's sum: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(x.dtype, torch.float32)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows `index` (B, K) of `x` (B, L, C); (B, K, C). Copies whole rows, which gather does not."""
    batch, length, channels = x.shape
    flat = index + torch.arange(0, batch * length, length, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(batch, index.shape[1], channels)


def best(scores: Tensor, keep: int) -> Tensor:
    """Return which `keep` scores are highest, (B, K), falling, the lower index first among equals."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep]


def gather_and_fuse(x: Tensor, scores: Tensor, index: Tensor, fuse: bool) -> Tensor:
    """Return the class token, tokens `index` and, if `fuse` and any is left, the fused rest."""
    kept = rows(x, F.pad(index + 1, (1, 0)))  # row 0 is the class token
    if not fuse or index.shape[1] == scores.shape[1]:
        return kept
    # a product and a sum, not a batched matmul: with that the exporter fixes the batch size at 1
    dtype = compute_dtype(x)
    rest = scores.to(dtype).scatter(1, index, 0.0).unsqueeze(-1)
    fused = (rest * x[:, 1:].to(dtype)).sum(dim=1, keepdim=True)
    return torch.cat([kept, fused.to(x.dtype)], dim=1)


def reorganize_tokens_reference(
    x: Tensor, scores: Tensor, keep: int, fuse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (tokens, indices); see `vitzoo.kernels.reorganize_tokens`."""
    index = best(scores, keep)
    return gather_and_fuse(x, scores, index, fuse), index
