"""Inputs of the causal convolution: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch: B.
        dim: D.
        seqlen: L.
        width: W.
        has_bias: with a bias.
        has_initial: with initial states.
        activation: None, "silu" or "swish".
        reverse: from the last token to the first.
        channels_last: x has a contiguous channel axis, as a linear layer's output has.
    """

    batch: int
    dim: int
    seqlen: int
    width: int = 4
    has_bias: bool = True
    has_initial: bool = False
    activation: str | None = "silu"
    reverse: bool = False
    channels_last: bool = False


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 2, 3, 2),
    "one_token": Shape(2, 5, 1, 3, has_initial=True),
    "shorter_than_width": Shape(3, 18, 2, 4, has_initial=True, reverse=True),
    "plain": Shape(2, 6, 19, 3, has_bias=False, activation=None),
    "odd": Shape(3, 37, 67, 4, has_initial=True),
    "reverse": Shape(3, 19, 133, 4, has_initial=True, reverse=True),
    "channels_last": Shape(3, 37, 70, 4, channels_last=True),
    "channels_last_reverse": Shape(2, 21, 150, 2, has_initial=True, reverse=True, channels_last=True),
    "long": Shape(1, 17, 1100, 3, activation="swish"),
}
# The models' own sizes, for benchmarks.
MODEL_SHAPES: dict[str, Shape] = {
    "vim_small": Shape(8, 768, 197),
    "vim_small_channels_last": Shape(8, 768, 197, channels_last=True),
    "vim_tiny_b1": Shape(1, 384, 197),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call.

    Args:
        shape: sizes and options.
        dtype: of x and initial_states; weight and bias have at least float32.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of).to(device)

    x = normal(shape.batch, shape.dim, shape.seqlen)
    if shape.channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    states = (shape.batch, shape.dim, shape.width - 1)
    return {
        "x": x,
        "weight": normal(shape.dim, shape.width, of=wide) * shape.width**-0.5,
        "bias": normal(shape.dim, of=wide) if shape.has_bias else None,
        "initial_states": normal(*states) if shape.has_initial else None,
        "activation": shape.activation,
        "reverse": shape.reverse,
    }


def grouped_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
) -> Tensor:
    """Return torch's grouped convolution and SiLU, as Mamba's slow path writes them: no states, forwards."""
    dim, width = weight.shape
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=dim)[..., : x.shape[-1]]
    return y if activation is None else F.silu(y)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
) -> Tensor:
    """Return the same as a convolution of one row, channels last: oneDNN's fast depthwise kernel."""
    dim, width = weight.shape
    x = F.pad(x.transpose(1, 2), (0, 0, width - 1, 0)).transpose(1, 2).unsqueeze(2)
    y = F.conv2d(x, weight.view(dim, 1, 1, width), bias, groups=dim).squeeze(2)
    return y if activation is None else F.silu(y)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "torch grouped conv1d + silu": grouped_conv1d,
    "torch channels-last conv2d + silu": grouped_conv2d,
}
