"""Token reorganization: score tokens by the class token's attention, keep the best, fuse the rest, map back.

Legend: B batch, C channels, L tokens (class token in front included), K tokens kept, P patches of the input
grid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import Attention
from timm.models._features_fx import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.attention_with_scores import attention_with_scores as kernels_attention_with_scores
from vitzoo.kernels.reorganize_tokens import reorganize_tokens

FUSED = -1

# it checks shapes and chooses a backend: FX keeps the call whole
register_notrace_function(kernels_attention_with_scores)


def class_attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Return the attention that the class token pays to every other token, averaged over heads.

    Only the class token's row of the attention matrix is formed. The class token's own column is left out and
    the rest is not normalised again, so a row sums to less than 1.

    Args:
        q: queries, (B, heads, L, head_dim), class token first.
        k: keys, likewise.
        scale: factor of the products, head_dim ** -0.5 if None.

    Returns:
        (B, L - 1), float32 for half-precision inputs, otherwise of their dtype.

    Source: Liang et al., EViT, arXiv 2202.07800, equation 3 and section 3.2.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    row = (q[:, :, :1] * scale) @ k.transpose(-2, -1)  # (B, heads, 1, L)
    row = row.to(torch.promote_types(row.dtype, torch.float32)).softmax(dim=-1)
    return row[:, :, 0, 1:].mean(dim=1)


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend, and return the class token's attention beside the output, without keeping the attention matrix.

    Args:
        q: queries, (B, heads, L, head_dim), class token first.
        k: keys, likewise.
        v: values, likewise.
        scale: factor of the products, head_dim ** -0.5 if None.
        dropout_p: probability that an attention weight is dropped; the scores are taken before dropout. With any,
            PyTorch's attention takes the operator's place.

    Returns:
        The attention's output, (B, heads, L, head_dim), and the scores of `class_attention`, (B, L - 1).
    """
    if dropout_p > 0.0:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
        return out, class_attention(q, k, scale)
    return kernels_attention_with_scores(q, k, v, scale)


def keep_count(rate: float, count: int) -> int:
    """Return how many of `count` tokens a keep rate keeps: rate * count in double precision, rounded up."""
    return math.ceil(rate * count)


@torch.fx.wrap
@register_notrace_function
def prune_tokens(
    x: Tensor, scores: Tensor, rate: float, tokens: int | None, fuse: bool
) -> tuple[Tensor, Tensor | None]:
    """Reorganize tokens unless all would be kept.

    Args:
        x: (B, L, C), class token first.
        scores: (B, L - 1).
        rate: share to keep of all but the class token; the number is rounded up.
        tokens: number to keep instead, if not None.
        fuse: append a fused token.

    Returns:
        The tokens and which were kept, (B, K), None if nothing was dropped.

    Raises:
        ValueError: `tokens` exceeds the number there is.
    """
    count = x.shape[1] - 1
    keep = keep_count(rate, count) if tokens is None else tokens
    if keep > count:
        raise ValueError(f"keep tokens {keep} exceeds the {count} tokens that are left")
    if keep == count:
        return x, None
    return reorganize_tokens(x, scores, keep, fuse)


def track_patches(patches: Tensor | None, index: Tensor, fused: bool) -> Tensor:
    """Follow which patch of the input grid each token stands for through one reorganization.

    Args:
        patches: patch numbers before it, (B, L - 1), `FUSED` (-1) for a fused token; None if none was dropped
            yet.
        index: which tokens were kept, (B, K), from `reorganize_tokens`.
        fused: a fused token was appended.

    Returns:
        Patch numbers after it, (B, K) or (B, K + 1), int64.
    """
    patches = index if patches is None else patches.gather(1, index)
    return F.pad(patches, (0, 1), value=FUSED) if fused else patches


def scatter_tokens(tokens: Tensor, patches: Tensor | None, num_patches: int) -> Tensor:
    """Put tokens back at the slots of their patches; zeros elsewhere, fused tokens are left out.

    Args:
        tokens: without the class token, (B, T, C).
        patches: their patch numbers, (B, T), from `track_patches`; None if they are the whole grid in order.
        num_patches: P.

    Returns:
        (B, P, C).
    """
    if patches is None:
        return tokens
    batch, _, channels = tokens.shape
    # fused tokens go to a slot behind the grid that is cut off
    slots = torch.where(patches < 0, num_patches, patches)
    flat = slots + torch.arange(
        0, batch * (num_patches + 1), num_patches + 1, device=tokens.device
    ).unsqueeze(1)
    grid = tokens.new_zeros(batch * (num_patches + 1), channels)
    grid = grid.index_put((flat.reshape(-1),), tokens.reshape(-1, channels))
    return grid.view(batch, num_patches + 1, channels)[:, :num_patches]


def patch_mask(patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Return which patches of the input grid are among `patches`, to draw what a pruning stage kept.

    Args:
        patches: patch numbers, (B, K), negative ones (fused tokens) stand for no patch.
        grid_size: height and width of the grid.

    Returns:
        (B, height, width), bool.
    """
    count = grid_size[0] * grid_size[1]
    mask = patches.new_zeros(patches.shape[0], count + 1, dtype=torch.bool)
    slots = torch.where(patches < 0, count, patches)
    return mask.scatter(1, slots, True)[:, :count].unflatten(1, grid_size)


class ScoredAttention(Attention):
    """timm's attention, which hands out the class token's attention on request."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        return_scores: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: tokens, (B, L, C), class token first.
            attn_mask: as in timm; not together with `return_scores`.
            is_causal: likewise.
            return_scores: return the scores too.

        Returns:
            (B, L, C), or that and the scores of `class_attention`, (B, L - 1).
        """
        if not return_scores:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out, scores = attention_with_scores(self.q_norm(q), self.k_norm(k), v, self.scale, dropout_p)
        out = out.transpose(1, 2).reshape(batch, length, self.attn_dim)
        return self.proj_drop(self.proj(self.norm(out))), scores
