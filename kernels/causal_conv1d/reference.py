"""Causal depthwise convolution in plain PyTorch: the definition.

Legend: B batch, D channels, L tokens, W width of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = (None, "silu", "swish")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products and sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(x.dtype, torch.float32)


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (out, final_states); see `vitzoo.kernels.causal_conv1d` for shapes.

    y_t = bias + sum_k weight_k x_{t - W + 1 + k}, out = silu(y) or y; `reverse` walks the tokens from the last to the
    first.
    """
    dtype = compute_dtype(x)
    dim, width = weight.shape
    before = x[..., :1].new_zeros(()).expand(x.shape[0], dim, width - 1)
    if initial_states is not None:
        before = initial_states.to(x.dtype)
    if reverse:  # the samples after x, and the taps, in the order of the tokens
        full = torch.cat([x, before.flip(-1)], dim=-1)
        taps = weight.flip(-1)
        final_states = full[..., : width - 1].flip(-1)
    else:
        full = torch.cat([before, x], dim=-1)
        taps = weight
        final_states = full[..., x.shape[-1] :]
    if dim == 0 or x.shape[-1] == 0:  # which conv1d refuses
        return x.clone(), final_states
    b = None if bias is None else bias.to(dtype)
    y = F.conv1d(full.to(dtype), taps.to(dtype).unsqueeze(1), b, groups=dim)
    return (y if activation is None else F.silu(y)).to(x.dtype), final_states
