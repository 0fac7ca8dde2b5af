"""Attention of each position to a zero-padded window around it (MSA-Conv)."""

from vitzoo.kernels.local_attention.op import local_attention

__all__ = ["local_attention"]
