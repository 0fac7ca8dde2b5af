"""Moves what is hard to quantize from activations into weights, without changing the function in floating point.

A LayerNorm and the linear layers that read it share a change of scale per channel: the LayerNorm's weight and bias
take its inverse. Both transforms below leave an ordinary graph with one scale a tensor, which every runtime can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitzoo.quantization.quantizers import Uniform

_LEAST = 1e-5


def smoothing_scales(activation_max: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """Return SmoothQuant's scale of each channel, max|X_j|^alpha / max|W_j|^(1 - alpha).

    Args:
        activation_max: largest magnitude of each channel, (C,).
        weights: of the linear layers that read the channels, each (out_features, C).
        alpha: how much of the difficulty goes into the weights, 0 to 1.

    Raises:
        ValueError: alpha outside 0 to 1.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0 to 1")
    weight_max = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(_LEAST)
    return (activation_max.to(weight_max) ** alpha / weight_max ** (1 - alpha)).clamp_min(_LEAST)


@torch.no_grad()
def smooth(
    norm: nn.LayerNorm, linears: Sequence[nn.Linear], activation_max: Tensor, alpha: float = 0.5
) -> Tensor:
    """Divide a LayerNorm's output by SmoothQuant's scales and multiply the columns of its readers; return the scales.

    Args:
        norm: with weight and, if it has one, bias; changed in place.
        linears: every layer that reads it; changed in place.
        activation_max: largest magnitude of each channel of the norm's output over the calibration images, (C,).
        alpha: see `smoothing_scales`.
    """
    scales = smoothing_scales(activation_max, [layer.weight for layer in linears], alpha)
    for parameter in (norm.weight, norm.bias):
        if parameter is not None:
            parameter.div_(scales)
    for layer in linears:
        layer.weight.mul_(scales)
    return scales


@dataclass(frozen=True)
class Reparameterization:
    """What RepQ-ViT's change of scale does to a LayerNorm and its readers.

    Attributes:
        norm_weight: new weight of the norm, (C,).
        norm_bias: new bias of the norm, (C,).
        ratio: what the columns of each reader are multiplied by, (C,).
        shift: its product with a reader's new weight is added to the reader's bias, (C,).
        quantizer: of the norm's new output, one scale for the tensor.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    ratio: Tensor
    shift: Tensor
    quantizer: Uniform


def reparameterized(
    norm_weight: Tensor, norm_bias: Tensor, channels: Uniform, round_zero_point: bool = False
) -> Reparameterization:
    """Turn one quantizer a channel of a LayerNorm's output into one for the tensor.

    With scales s_c and zero points z_c, their means S and Z, r = s_c / S and t = -z_c s_c / r + Z S: the norm becomes
    weight / r and bias / r - t, each reader's columns are multiplied by r, and its bias gains W t.

    Args:
        norm_weight: (C,).
        norm_bias: (C,).
        channels: the quantizer of the norm's output, one scale and zero point a channel.
        round_zero_point: round Z, which integer hardware needs; before the shift is computed, so that the function
            stays what it was. The authors leave a fraction.

    Source: RepQ-ViT (arXiv 2212.08254), equations 9 to 13.
    """
    scale, zero = channels.scale.flatten(), channels.zero_point.flatten()
    target_scale, target_zero = scale.mean(), zero.mean()
    if round_zero_point:
        target_zero = torch.round(target_zero)
    ratio = scale / target_scale
    shift = -zero * scale / ratio + target_zero * target_scale
    quantizer = Uniform(target_scale, target_zero, channels.qmin, channels.qmax)
    return Reparameterization(norm_weight / ratio, norm_bias / ratio - shift, ratio, shift, quantizer)


@torch.no_grad()
def reparameterize(
    norm: nn.LayerNorm, linears: Sequence[nn.Linear], channels: Uniform, round_zero_point: bool = False
) -> Uniform:
    """Apply `reparameterized` to modules, in place; return the quantizer of the norm's new output.

    Args:
        norm: with weight and bias.
        linears: every layer that reads it; a bias is made where there is none.
        channels: see `reparameterized`.
        round_zero_point: see `reparameterized`.
    """
    moved = reparameterized(norm.weight, norm.bias, channels, round_zero_point)
    norm.weight.copy_(moved.norm_weight)
    norm.bias.copy_(moved.norm_bias)
    for layer in linears:
        layer.weight.mul_(moved.ratio)
        added = layer.weight @ moved.shift
        if layer.bias is None:
            layer.bias = nn.Parameter(added)
        else:
            layer.bias.add_(added)
    return moved.quantizer
