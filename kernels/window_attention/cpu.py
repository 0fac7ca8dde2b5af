"""Window attention on the CPU in C++ (csrc/window_attention): allocates what comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.window_attention.reference import compute_dtype, padded_size

# Work items that the backward pass aims at. The windows of a part are added up by one item, the parts in a fixed order
# afterwards: the gradients of the bias do not depend on the number of threads.
BACKWARD_ITEMS = 64
LANES = 16  # rows of the transposed bias are padded to the widest vector


def why_not(qkv: Tensor | None = None, *args: object) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return native.cpu_why_not("qkv", qkv, "window_attention_fwd", "window_attention_bwd")


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(attn_bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the bias, contiguous, and memory for it with keys before queries."""
    if attn_bias is None:
        return None, None
    heads, area, _ = attn_bias.shape
    transposed = torch.empty((heads, area, -(-area // LANES) * LANES), dtype=dtype)
    return attn_bias.detach().to(dtype).contiguous(), transposed


def _options(
    qkv: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    attn_bias: Tensor | None,
    scale: float,
    pad_qkv: Tensor | None,
    roll_before_pad: bool,
) -> tuple[object, ...]:
    pad = None if pad_qkv is None else pad_qkv.detach().to(qkv.dtype).contiguous()
    bias = _bias(attn_bias, compute_dtype(qkv))
    return (num_heads, *window_size, *shift_size, *bias, scale, pad, roll_before_pad)


def forward(qkv: Tensor, *options: object) -> Tensor:
    """Return the attention's output, (B, H, W, C)."""
    out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype)
    torch.ops.vitzoo_native.window_attention_fwd(_channels_last(qkv), *_options(qkv, *options), out)  # type: ignore[arg-type]
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
    transposed = options[6]
    batch, height, width, channels = qkv.shape
    windows = batch * math.prod(
        padded_size(s, w) // w for s, w in zip((height, width), window_size, strict=True)
    )
    parts = max(1, min(windows, -(-BACKWARD_ITEMS // num_heads)))
    dtype = compute_dtype(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    dbias = torch.empty((parts, *transposed.shape), dtype=dtype) if isinstance(transposed, Tensor) else None
    dpad = None if pad_qkv is None else torch.empty((parts, channels), dtype=dtype)
    torch.ops.vitzoo_native.window_attention_bwd(
        _channels_last(dout.to(qkv.dtype)), _channels_last(qkv), *options, parts, dqkv, dbias, dpad
    )
    return (
        dqkv,
        None if dbias is None else dbias.sum(0)[..., : dbias.shape[2]].transpose(1, 2),
        None if dpad is None else dpad.sum(0),
    )
