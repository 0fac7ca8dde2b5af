"""Adaptive polyphase anchoring and circular padding: what makes a network follow circular shifts exactly.

Source: Ding et al., "Reviving Shift Equivariance in Vision Transformers", arXiv 2306.07470, section 3;
https://github.com/willding123/Shift-Equivariant-Vision-Transformers at
c8cd2ef40b435d9615c790b2461694ba89a36be4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import register_notrace_function
from torch import Tensor


def _anchors(x: Tensor, dim: int, phase: tuple[int, int]) -> Tensor:
    """Return the strongest phase of maps whose channels are axis `dim`, (B, 2) int64, the first of equals."""
    (ph, pw), x = phase, x.detach()
    if x.dtype != torch.float64:
        x = x.float()  # squares overflow in float16, and norms tie in bfloat16
    energy = x.square().sum(dim)
    batch, height, width = energy.shape
    # a shifted map is summed in another order: the wider type keeps rounding from deciding between phases
    if x.device.type != "mps":
        energy = energy.double()
    energy = energy.reshape(batch, height // ph, ph, width // pw, pw).sum((1, 3))
    best = energy.flatten(1).argmax(1)
    return torch.stack((best // pw, best % pw), dim=1)


def _source(anchors: Tensor, height: int, width: int) -> Tensor:
    """Return for each position of the shifted map the row-major position it comes from, (B, H, W)."""
    rows = (torch.arange(height, device=anchors.device) + anchors[:, :1]) % height
    cols = (torch.arange(width, device=anchors.device) + anchors[:, 1:]) % width
    return rows[:, :, None] * width + cols[:, None, :]


def _check(height: int, width: int, phase: tuple[int, int]) -> None:
    if min(phase) < 1 or height % phase[0] or width % phase[1]:
        raise ValueError(
            f"a map of {height}x{width} is not divisible by the phase size {phase[0]}x{phase[1]}"
        )


@register_notrace_function
def polyphase_anchor(x: Tensor, phase: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Shift each map circularly so that its strongest polyphase component starts at the origin.

    Phase (r, c) of a map is x[:, r::ph, c::pw]; the one of largest L2 norm wins, the first in row-major order
    on ties. For a circular shift of x the result differs only by a shift of multiples of (ph, pw), unless
    norms tie. The choice carries no gradient; norms are computed in float32 or wider.

    Args:
        x: maps, (B, C, H, W), any floating dtype.
        phase: (ph, pw), which must divide H and W.

    Returns:
        The maps y[b, :, i, j] = x[b, :, (i + r) % H, (j + c) % W], and the chosen (r, c), (B, 2) int64.

    Raises:
        ValueError: a size that the phase does not divide.

    Source: arXiv 2306.07470, `PolyOrder` of the authors' models/poly_utils.py.
    """
    batch, channels, height, width = x.shape
    _check(height, width, phase)
    anchors = _anchors(x, 1, phase)
    source = _source(anchors, height, width).reshape(batch, 1, height * width)
    y = x.flatten(2).gather(2, source.expand(-1, channels, -1))
    return y.view(batch, channels, height, width), anchors


@register_notrace_function
def polyphase_anchor_tokens(
    x: Tensor, size: tuple[int, int], phase: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Anchor maps laid out as tokens; see `polyphase_anchor`.

    Args:
        x: (B, H*W, C), row-major.
        size: (H, W).
        phase: (ph, pw), which must divide H and W.

    Returns:
        The shifted tokens (B, H*W, C), and the chosen (r, c), (B, 2) int64.

    Raises:
        ValueError: a size that the phase does not divide.
    """
    (height, width), (batch, length, channels) = size, x.shape
    _check(height, width, phase)
    anchors = _anchors(x.unflatten(1, (height, width)), -1, phase)
    start = torch.arange(batch, device=x.device)[:, None] * length
    # rows of a matrix are copied whole: 9 times as fast as a gather along the tokens (56x56x64 on CPU)
    source = (start + _source(anchors, height, width).flatten(1)).flatten()
    return x.reshape(batch * length, channels).index_select(0, source).view(batch, length, channels), anchors


@register_notrace_function
def circular_pad_tokens(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Wrap maps laid out as tokens by one position on each side, for a 3x3 convolution on a torus.

    Args:
        x: (B, H*W, C), row-major.
        size: (H, W).

    Returns:
        (B, C, H + 2, W + 2), channels last in memory.
    """
    height, width = size
    rows = torch.arange(-1, height + 1, device=x.device) % height
    cols = torch.arange(-1, width + 1, device=x.device) % width
    y = x.index_select(1, (rows[:, None] * width + cols).flatten())
    return y.unflatten(1, (height + 2, width + 2)).permute(0, 3, 1, 2)


@register_notrace_function
def square_side(x: Tensor) -> int:
    """Return the side of the square map whose tokens are x (B, L, C).

    Raises:
        ValueError: L is not a square.
    """
    side = math.isqrt(int(x.shape[1]))
    if side * side != x.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens are no square map")
    return side


@register_notrace_function
def check_square(size: Sequence[int], unit: int, what: str) -> None:
    """Require a square size that is a multiple of `unit`.

    Args:
        size: (H, W).
        unit: what the side must be a multiple of.
        what: name of the value, for the message.

    Raises:
        ValueError: another size; the message names it and what is allowed.
    """
    height, width = size
    if height != width or height < unit or height % unit:
        raise ValueError(f"{what} {height}x{width} is not a square whose side is a multiple of {unit}")
