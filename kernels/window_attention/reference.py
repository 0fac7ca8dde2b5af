"""Window attention in plain PyTorch: pad, shift, cut into windows, attend, and all the way back.

Legend: B batch, C channels, H W height and width of the map, M tokens of a window, R windows of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitzoo.kernels.common.registration import backward_by_autograd

TENSORS = (0, 4, 6)  # qkv, attn_bias and pad_qkv among the operator's inputs


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products and softmax: float32, float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return (vertical, horizontal) of one number for both or of two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def padded_size(size: int, window: int) -> int:
    """Return the smallest multiple of the window that holds the map."""
    return -(-size // window) * window


def _pad(x: Tensor, dim: int, count: int, values: Tensor) -> Tensor:
    if not count:
        return x
    shape = [*x.shape[:dim], count, *x.shape[dim + 1 :]]
    return torch.cat([x, values.to(x.dtype).expand(shape)], dim=dim)


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return which of three regions each window-space coordinate of one axis lies in, (padded size,)."""
    padded = padded_size(size, window)
    place = torch.arange(padded, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= padded - window).to(place.dtype) + (place >= padded - shift).to(place.dtype)


def excluded_keys(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Return Swin's mask, (R, M, M) of query and key, True where they come from different sides of the map."""
    rows, cols = (_regions(s, w, t, device) for s, w, t in zip(size, window, shift, strict=True))
    region = (3 * rows[:, None] + cols).unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # (R, M)
    return region.unsqueeze(1) != region.unsqueeze(2)


def window_attention_reference(
    qkv: Tensor,
    num_heads: int,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    pad_qkv: Tensor | None = None,
    roll_before_pad: bool = False,
) -> Tensor:
    """Return (B, H, W, C), the dtype of qkv; the arguments are those of `window_attention`."""
    (win_h, win_w), (shift_h, shift_w) = pair(window_size), pair(shift_size)
    batch, height, width, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
    head_dim = channels // num_heads
    scale = head_dim**-0.5 if scale is None else scale
    full_h, full_w = padded_size(height, win_h), padded_size(width, win_w)
    rows, cols, area = full_h // win_h, full_w // win_w, win_h * win_w
    shifted, shifts = bool(shift_h or shift_w), (-shift_h, -shift_w)
    padding = qkv.new_zeros(3 * channels) if pad_qkv is None else pad_qkv.to(qkv.dtype)

    x = qkv.to(compute_dtype(qkv))
    if shifted and roll_before_pad:
        x = x.roll(shifts, (1, 2))
    x = _pad(_pad(x, 2, full_w - width, padding), 1, full_h - height, padding)
    if shifted and not roll_before_pad:
        x = x.roll(shifts, (1, 2))
    x = x.reshape(batch, rows, win_h, cols, win_w, 3, num_heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    x = x.reshape(3, batch, rows * cols, num_heads, area, head_dim)
    q, k, v = x.unbind(0)
    attn = (q * scale) @ k.transpose(-2, -1)  # (B, R, heads, M, M)
    if attn_bias is not None:
        attn = attn + attn_bias.to(attn.dtype)
    if shifted:
        mask = excluded_keys((height, width), (win_h, win_w), (shift_h, shift_w), qkv.device)
        attn = attn.masked_fill(mask.unsqueeze(1), float("-inf"))
    x = attn.softmax(dim=-1) @ v  # (B, R, heads, M, head_dim)
    x = x.reshape(batch, rows, cols, num_heads, win_h, win_w, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, full_h, full_w, channels)
    if shifted and not roll_before_pad:
        x = x.roll((shift_h, shift_w), (1, 2))
    x = x[:, :height, :width]
    if shifted and roll_before_pad:
        x = x.roll((shift_h, shift_w), (1, 2))
    return x.to(qkv.dtype)


def window_attention_reference_bwd(dout: Tensor, *inputs: object) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, attn_bias and pad_qkv; None for absent ones."""
    return backward_by_autograd(window_attention_reference, inputs, (dout,), TENSORS)
