"""Integer-only softmax, GELU and LayerNorm of FQ-ViT and I-ViT, carried in floating point as their authors do.

Inputs come with their scale: x = scale * integer. Results of float32 tensors round integers above 2^24, as published
code does; float64 tensors hold them exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.quantization.quantizers import Uniform

_INT32 = 2**31 - 1


def log_int_softmax(x: Tensor, scale: Tensor | float, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Return softmax over the last axis as powers of two, by integer exponentials.

    Args:
        x: scores, scale times integers.
        scale: of the scores.
        bits: width of the codes.

    Returns:
        the probabilities 2^-q, or 0 where q needs more bits; the integer softmax before its logarithm, exp / sum.

    Source: FQ-ViT (arXiv 2111.13824), section 3.3, Log-Int-Softmax; the polynomial is I-BERT's.
    """
    exp = _polynomial_exp(x, scale)
    total = exp.sum(-1, keepdim=True)
    ratio = torch.round(total / exp)
    power = torch.floor(torch.log2(ratio))
    code = power + (ratio - torch.pow(2.0, power) >= torch.pow(2.0, power - 1))
    return torch.where(code >= 2**bits, 0.0, torch.pow(2.0, -code)), exp / total


def _polynomial_exp(x: Tensor, scale: Tensor | float, shift: int = 30) -> Tensor:
    """Return 2^shift exp(x - max) in integers: a power of two times 0.358 r^2 + 0.970 r + 1 on the rest r of -ln 2."""
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    integers = x / scale
    integers = integers - integers.amax(-1, keepdim=True)
    step = torch.floor(-0.6931 / scale)
    integers = torch.maximum(integers, shift * step)
    quotient = torch.floor(integers / step)
    rest = integers - step * quotient
    b = torch.floor((0.96963238 / 0.35815147) / scale)
    c = torch.floor((1.0 / 0.35815147) / scale**2)
    return torch.floor((rest * (rest + b) + c) * torch.pow(2.0, shift - quotient)).clamp_min(0)


def integer_layer_norm(
    x: Tensor, quantizer: Uniform, weight: Tensor, bias: Tensor, out_scale: Tensor
) -> Tensor:
    """Return FQ-ViT's LayerNorm over the last axis, in multiples of out_scale and without its zero point.

    Args:
        x: input that `quantizer` has rounded already, (..., C).
        quantizer: with power-of-two factors, see `calibration.fit_power_of_two_factors`.
        weight: (C,).
        bias: (C,).
        out_scale: of the output.

    Source: FQ-ViT (arXiv 2111.13824), section 3.2.
    """
    channels = x.shape[-1]
    least = quantizer.scale.min()
    integers = torch.round(x / quantizer.scale) * torch.round(quantizer.scale / least)
    mean = integers.mean(-1) * least
    std = (least / channels) * torch.sqrt(channels * (integers**2).sum(-1) - integers.sum(-1) ** 2)
    factor = (least / std).unsqueeze(-1) * weight / out_scale
    magnitude = factor.abs()
    places = (7 - torch.floor(torch.log2(magnitude))).clamp(0, 31)
    multiplier = torch.floor(magnitude * torch.pow(2.0, places)).clamp(0, 255)
    shift = (bias - (mean / std).unsqueeze(-1) * weight) / out_scale
    offset = torch.round(shift * torch.pow(2.0, places))
    out = (factor.sign() * multiplier * integers + offset) / torch.pow(2.0, places)
    return torch.round(out) * out_scale


def _shift_exp(x: Tensor, scale: Tensor, shift: int) -> Tensor:
    """Return 2^shift exp(scale x) for integers x <= 0 by shifts and additions (I-ViT's ShiftExp)."""
    x = x + torch.floor(x / 2) - torch.floor(x / 16)
    unit = torch.floor(-1.0 / scale)
    x = torch.maximum(x, shift * unit)
    quotient = torch.floor(x / unit)
    rest = x - unit * quotient
    return torch.floor((rest / 2 - unit) * torch.pow(2.0, shift - quotient)).clamp_min(0)


def shiftmax(x: Tensor, scale: Tensor | float, bits: int = 16) -> tuple[Tensor, float]:
    """Return I-ViT's integer softmax over the last axis and its scale.

    Args:
        x: scores, scale times integers.
        scale: of the scores.
        bits: width of the output.

    Returns:
        the probabilities, multiples of the scale, and the scale 2^-(bits-1).

    Source: I-ViT (arXiv 2207.01405), Algorithm 1.
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    integers = x / scale
    exp = _shift_exp(integers - integers.amax(-1, keepdim=True), scale, 15)
    total = exp.sum(-1, keepdim=True).clamp_max(_INT32)
    out_scale = 2.0 ** -(bits - 1)
    return torch.floor(exp * torch.floor(_INT32 / total) / 2.0 ** (31 - bits + 1)) * out_scale, out_scale


def shift_gelu(x: Tensor, scale: Tensor | float, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return I-ViT's integer GELU, x sigmoid(1.702 x), and its scale.

    Args:
        x: input, scale times integers; the maximum that keeps exponentials in range is taken over the last axis.
        scale: of the input.
        bits: width of the sigmoid.

    Returns:
        the output and its scale, scale 2^-(bits-1).

    Source: I-ViT (arXiv 2207.01405), Algorithm 2.
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    integers = x / scale
    largest = integers.amax(-1, keepdim=True)
    sigmoid_scale = scale * 1.702
    exp = _shift_exp(integers - largest, sigmoid_scale, 23)
    total = (exp + _shift_exp(-largest, sigmoid_scale, 23)).clamp_max(_INT32)
    sigmoid = torch.floor(exp * torch.floor(_INT32 / total) / 2.0 ** (31 - bits + 1))
    out_scale = scale * 2.0 ** -(bits - 1)
    return integers * sigmoid * out_scale, out_scale


def shift_layer_norm(x: Tensor, scale: Tensor | float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return I-ViT's integer LayerNorm over the last axis and its scale, one a channel.

    Args:
        x: input, scale times integers, (..., C).
        scale: of the input.
        weight: (C,).
        bias: (C,).

    Source: I-ViT (arXiv 2207.01405), section 3.4; the square root is Newton's, ten steps from 2^16.
    """
    integers = x / torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    centred = integers - torch.round(integers.mean(-1, keepdim=True))
    variance = (centred**2).sum(-1, keepdim=True)
    std = torch.full_like(variance, 2.0**16)
    for _ in range(10):
        std = torch.floor((std + torch.floor(variance / std)) / 2)
    normal = torch.floor(centred * torch.floor(_INT32 / std) / 2)
    out_scale = torch.tensor(x.shape[-1], dtype=x.dtype).sqrt() / 2**30
    offset = torch.floor((bias / weight) / out_scale)
    return (normal + offset) * out_scale * weight, out_scale * weight
