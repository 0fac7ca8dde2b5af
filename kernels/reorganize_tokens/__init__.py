"""Token reorganization: keep the best tokens in order of score, fuse the rest (EViT)."""

from vitzoo.kernels.reorganize_tokens.op import reorganize_tokens

__all__ = ["reorganize_tokens"]
