"""Normalisation that keeps its precision when the model runs in a short type."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F


@register_notrace_function
def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor as float32 if its type is shorter, else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register_notrace_module
class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis, computed in float32 or wider.

    `nn.RMSNorm` wants input and weight of one type. Here a bfloat16 model can normalise a float32 residual
    stream without rounding it first.

    Source: arXiv 1910.07467, equation 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: (..., C), any floating-point type.

        Returns:
            x / sqrt(mean(x^2) + eps) * weight, (..., C), in the weight's type.
        """
        x = at_least_float32(x)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
