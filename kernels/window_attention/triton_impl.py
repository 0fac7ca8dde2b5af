"""Window attention in Triton: the windows of `common/attention/triton_impl.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitzoo.kernels.common.attention import triton_impl as attention
from vitzoo.kernels.window_attention.inputs import Shape, make_inputs
from vitzoo.kernels.window_attention.reference import pair


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """Return the parts (q, k, v) of a map (B, H, W, parts*C), each (B, heads, H, W, head_dim)."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)


def _call(
    qkv: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    attn_bias: Tensor | None,
    scale: float,
    pad_qkv: Tensor | None,
    roll_before_pad: bool,
) -> attention.Call:
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return attention.Call(
        *_heads(qkv, num_heads, 3),
        scale,
        attention.Windows(tuple(window_size), tuple(shift_size), roll_before_pad),
        None if attn_bias is None else attn_bias.contiguous(),
        None if pad_qkv is None else pad_qkv.to(qkv.dtype).contiguous(),
    )


def forward(qkv: Tensor, num_heads: int, *options: object) -> Tensor:
    """Return the attention's output, (B, H, W, C)."""
    out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
    attention.forward(_call(qkv, num_heads, *options), _heads(out, num_heads, 1)[0])
    return out


def backward(dout: Tensor, qkv: Tensor, num_heads: int, *options: object) -> tuple[Tensor | None, ...]:
    """Return the gradients of qkv, attn_bias and pad_qkv; None for absent ones."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dout = dout.to(qkv.dtype).contiguous()
    call = _call(qkv, num_heads, *options)
    dbias, dpad = attention.backward(call, _heads(dout, num_heads, 1)[0], None, *_heads(dqkv, num_heads, 3))
    return dqkv, dbias, dpad


def _ahead() -> tuple[object, ...]:
    found: tuple[object, ...] = ()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (
            Shape(2, 13, 12, 3, 32, 7, 3, has_bias=True, has_pad=True, roll_before_pad=True),
            Shape(2, 14, 14, 2, 32, 2),
        ):
            x = {
                k: v.to("meta") if isinstance(v, Tensor) else v for k, v in make_inputs(shape, dtype).items()
            }
            inputs = (
                x["qkv"],
                x["num_heads"],
                pair(x["window_size"]),
                pair(x["shift_size"]),
                x["attn_bias"],
                0.1,
            )
            inputs += (x["pad_qkv"], x["roll_before_pad"])
            dout = x["qkv"][..., : x["qkv"].shape[3] // 3]
            found += attention.launches(
                lambda inputs=inputs, dout=dout: (forward(*inputs), backward(dout, *inputs))
            )
    return found


AHEAD = _ahead()
