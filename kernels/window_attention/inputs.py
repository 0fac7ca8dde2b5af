"""Inputs of window attention: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.window_attention.reference import excluded_keys, pair


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        batch, height, width: B, H, W.
        num_heads, head_dim: C is their product.
        window_size, shift_size: as in the call.
        has_bias: with attn_bias.
        has_pad: with pad_qkv.
        roll_before_pad: as in the call.
    """

    batch: int
    height: int
    width: int
    num_heads: int
    head_dim: int
    window_size: int | tuple[int, int]
    shift_size: int | tuple[int, int] = 0
    has_bias: bool = False
    has_pad: bool = False
    roll_before_pad: bool = False


SHAPES: dict[str, Shape] = {
    "one_token": Shape(1, 1, 1, 1, 1, 1),
    "hifi": Shape(2, 6, 8, 2, 8, 2),
    "hifi_padded": Shape(2, 5, 7, 2, 8, 2, has_pad=True),
    "hifi_bias": Shape(1, 6, 5, 3, 5, 2, (1, 1), has_bias=True, has_pad=True),
    "swin": Shape(2, 14, 14, 2, 8, 7, 3, has_bias=True),
    "swin_padded": Shape(1, 9, 12, 2, 4, 5, 2, has_bias=True, has_pad=True),
    "rolled_first": Shape(3, 9, 12, 2, 4, 5, 2, has_bias=True, has_pad=True, roll_before_pad=True),
    "zero_padding": Shape(2, 5, 9, 1, 20, 4, 1),
    "oblong": Shape(1, 8, 11, 2, 7, (2, 5), (0, 3), has_bias=True),
    "one_axis": Shape(2, 3, 11, 1, 6, (3, 4), (1, 0)),
    "twins": Shape(1, 14, 14, 3, 16, 7),
    "large": Shape(1, 22, 24, 1, 20, 12, 5, has_bias=True),
    "small_map": Shape(2, 3, 2, 2, 33, 4, 2, has_bias=True),
}
_SWIN_TINY = ((56, 3), (28, 6), (14, 12), (7, 24))
# The models' own sizes, for benchmarks: Swin-T's stages (the last has one window and no shift), Hi-Fi of LITv2-S.
MODEL_SHAPES: dict[str, Shape] = {
    f"swin_tiny_stage{i}{'_shifted' if shift else ''}": Shape(
        4, side, side, heads, 32, 7, shift, has_bias=True
    )
    for i, (side, heads) in enumerate(_SWIN_TINY, 1)
    for shift in (0, 3)
    if not (shift and side == 7)
} | {"litv2_small_stage3": Shape(4, 14, 14, 2, 32, 2), "twins_svt_small_stage1": Shape(4, 56, 56, 2, 32, 7)}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call, all of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    area, channels = pair(shape.window_size), shape.num_heads * shape.head_dim
    tokens = area[0] * area[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return {
        "qkv": normal(shape.batch, shape.height, shape.width, 3 * channels),
        "num_heads": shape.num_heads,
        "window_size": shape.window_size,
        "shift_size": shape.shift_size,
        "attn_bias": normal(shape.num_heads, tokens, tokens) if shape.has_bias else None,
        "pad_qkv": normal(3 * channels) if shape.has_pad else None,
        "roll_before_pad": shape.roll_before_pad,
    }


@cache
def _swin_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    return excluded_keys(size, window, shift, torch.device("cpu")).float() * -100.0


def timm_window_attention(
    qkv: Tensor,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    attn_bias: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    roll_before_pad: bool = False,
    fused: bool = False,
) -> Tensor:
    """Attend as timm's SwinTransformerBlock does: roll, partition, attend, merge, roll back.

    What lies between the projections of timm's layer, in its default form or with `fused` attention, on the projected
    map instead of the layer's input. For maps that the window divides; the mask is made once, as there.
    """
    window, shift = pair(window_size), pair(shift_size)
    batch, height, width, tripled = qkv.shape
    rows, cols, area = height // window[0], width // window[1], window[0] * window[1]
    x = qkv.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else qkv
    x = x.view(batch, rows, window[0], cols, window[1], tripled)
    x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, area, 3, num_heads, tripled // 3 // num_heads)
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if attn_bias is None else attn_bias.unsqueeze(0)
    mask = _swin_mask((height, width), window, shift).to(qkv.dtype) if any(shift) else None
    x = _fused(q, k, v, bias, mask) if fused else _unfused(q, k, v, bias, mask)
    x = x.transpose(1, 2).reshape(batch, rows, cols, window[0], window[1], -1)
    x = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)
    return x.roll(shift, (1, 2)) if any(shift) else x


def _unfused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B*R, heads, M, M)
    if bias is not None:
        attn = attn + bias
    if mask is not None:
        attn = (attn.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
    return attn.softmax(dim=-1) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is not None:
        bias = mask.unsqueeze(1) if bias is None else bias + mask.unsqueeze(1)
        bias = bias.expand(-1, q.shape[1], -1, -1).repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


BASELINES = {"timm": timm_window_attention, "timm fused": partial(timm_window_attention, fused=True)}
