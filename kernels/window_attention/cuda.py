"""Window attention in CUDA C++ (csrc/window_attention): prepares bias and padding, allocates what comes out.

Maps go in their own dtype, with their strides, contiguous along the channels; bias and padding go in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.window_attention.reference import padded_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_AREA = 256  # tokens of a window
# Every GPU that the kernels are built for gives a block this much shared memory.
MAX_SHARED_BYTES = 99 * 1024
WARPS = 4  # of a block
ROWS = 4  # queries that a warp takes at a time
# Teams that the backward pass aims at where it adds up gradients of bias or padding: enough to fill a large GPU.
BACKWARD_TEAMS = 2048


def why_not(
    qkv: Tensor | None = None, num_heads: int = 1, window_size: Sequence[int] = (1, 1), *args: Any
) -> str | None:
    """Return why the CUDA kernels cannot take a call, or None."""
    if qkv is None:
        return native.cuda_why_not(None, "window_attention_cuda_fwd", "window_attention_cuda_bwd")
    if qkv.dtype not in DTYPES:
        return f"qkv is {qkv.dtype}, not float32, bfloat16 or float16"
    area, head_dim = math.prod(window_size), qkv.shape[3] // (3 * num_heads)
    if area > MAX_AREA:
        return f"a window of {area} tokens is larger than {MAX_AREA}"
    if shared_bytes(area, head_dim) > MAX_SHARED_BYTES:
        return f"a window of {area} tokens with head_dim {head_dim} exceeds a block's shared memory"
    return native.cuda_why_not(qkv, "window_attention_cuda_fwd", "window_attention_cuda_bwd")


def warps_per_item(area: int) -> int:
    """Return how many warps share one window of one head: as many as have queries to take, at most a block's."""
    return min(WARPS, 1 << max(0, -(-area // ROWS) - 1).bit_length())


def shared_bytes(area: int, head_dim: int) -> int:
    """Return the shared memory of a block of the backward pass, which takes more than the forward pass."""
    warps = warps_per_item(area)
    item = warps * ROWS * (head_dim + area) + area * (4 * (head_dim | 1) + 2 + 3)
    return 4 * (WARPS // warps * (-(-item // 4) * 4) + WARPS * 3 * head_dim)


def windows_per_part(windows: int, num_heads: int, area: int, head_dim: int, sums: bool) -> int:
    """Return how many windows a team of the backward pass takes, one after the other.

    The partial sums of the bias have no more elements than qkv.

    Args:
        windows: of all images.
        num_heads: heads.
        area: tokens of a window.
        head_dim: channels of a head.
        sums: whether gradients of bias or padding are added up over them.
    """
    if not sums:
        return 1
    return max(1, windows * num_heads // BACKWARD_TEAMS, -(-area // (3 * head_dim)))


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _options(
    qkv: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    attn_bias: Tensor | None,
    scale: float,
    pad_qkv: Tensor | None,
    roll_before_pad: bool,
) -> tuple[Any, ...]:
    bias = None if attn_bias is None else attn_bias.float().contiguous()
    pad = None if pad_qkv is None else pad_qkv.to(qkv.dtype).float().contiguous()
    warps = warps_per_item(math.prod(window_size))
    return (num_heads, *window_size, *shift_size, bias, scale, pad, roll_before_pad, warps)


def forward(qkv: Tensor, *options: Any) -> Tensor:
    """Return the attention's output, (B, H, W, C)."""
    out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
    torch.ops.vitzoo_native.window_attention_cuda_fwd(_channels_last(qkv), *_options(qkv, *options), out)
    return out


def backward(
    dout: Tensor,
    qkv: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    attn_bias: Tensor | None,
    scale: float,
    pad_qkv: Tensor | None,
    roll_before_pad: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, attn_bias and pad_qkv; None for absent ones."""
    options = _options(qkv, num_heads, window_size, shift_size, attn_bias, scale, pad_qkv, roll_before_pad)
    batch, height, width, channels = qkv.shape
    windows = batch * math.prod(
        padded_size(s, w) // w for s, w in zip((height, width), window_size, strict=True)
    )
    sums = attn_bias is not None or pad_qkv is not None
    count = windows_per_part(windows, num_heads, math.prod(window_size), channels // (3 * num_heads), sums)
    parts = -(-windows // count)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias, dpad = (
        None if x is None else torch.empty((parts, *x.shape), dtype=torch.float32, device=qkv.device)
        for x in (attn_bias, pad_qkv)
    )
    torch.ops.vitzoo_native.window_attention_cuda_bwd(
        _channels_last(dout.to(qkv.dtype)), _channels_last(qkv), *options, count, dqkv, dbias, dpad
    )
    return dqkv, None if dbias is None else dbias.sum(0), None if dpad is None else dpad.sum(0)
