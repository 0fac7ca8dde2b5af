"""Causal depthwise convolution along the tokens, with bias and SiLU."""

from vitzoo.kernels.causal_conv1d.op import causal_conv1d

__all__ = ["causal_conv1d"]
