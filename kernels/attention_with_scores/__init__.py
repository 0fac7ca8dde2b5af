"""Attention that hands out the class token's attention to the patches (EViT), without forming the matrix."""

from vitzoo.kernels.attention_with_scores.op import attention_with_scores

__all__ = ["attention_with_scores"]
