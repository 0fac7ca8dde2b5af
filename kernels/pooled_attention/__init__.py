"""Attention of every position of a map to a smaller map of keys and values (HiLo's Lo-Fi branch, PVT)."""

from vitzoo.kernels.pooled_attention.op import pooled_attention

__all__ = ["pooled_attention"]
