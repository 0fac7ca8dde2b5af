"""The operators vitzoo::window_attention and vitzoo::window_attention_bwd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.window_attention import cpu, cuda
from vitzoo.kernels.window_attention.reference import (
    padded_size,
    pair,
    window_attention_reference,
    window_attention_reference_bwd,
)

OPERATOR = Operator(
    "window_attention",
    backends=(
        Backend("cuda", {"forward": cuda.forward, "backward": cuda.backward}, cuda.why_not),
        triton_support.backend("window_attention", triton_support.narrow_why_not("qkv")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": window_attention_reference, "backward": window_attention_reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(qkv: Tensor, *args: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3))


def _flops(qkv: Any, num_heads: int, window_size: Sequence[int], *args: Any) -> int:
    tokens = qkv[0] * padded_size(qkv[1], window_size[0]) * padded_size(qkv[2], window_size[1])
    return 4 * tokens * prod(window_size) * (qkv[3] // 3)


def _backward_flops(dout: Any, *inputs: Any) -> int:
    # the scores again, and two products for each of the two of the forward pass
    return _flops(*inputs) * 5 // 2


_call = register(
    OPERATOR,
    "Tensor qkv, int num_heads, int[2] window_size, int[2] shift_size, Tensor? attn_bias, float scale, "
    "Tensor? pad_qkv, bool roll_before_pad",
    ("out",),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    autocast_cast=("qkv", "pad_qkv"),
)


def _checked_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(n, int) for n in value):
        raise ValueError(f"{name} is {value!r}, expected an integer or two, (vertical, horizontal)")
    return pair(value)


def _check(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    attn_bias: Tensor | None,
    pad_qkv: Tensor | None,
) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, expected a positive number")
    if qkv.ndim != 4 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, expected (B, H, W, 3*C) with C a multiple of num_heads {num_heads}"
        )
    if min(window) < 1:
        raise ValueError(f"window_size is {window}, expected positive numbers")
    if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift_size is {shift}, expected 0 <= shift < window_size {window}")
    area, tripled = window[0] * window[1], qkv.shape[3]
    if attn_bias is not None and attn_bias.shape != (num_heads, area, area):
        raise ValueError(
            f"attn_bias has shape {tuple(attn_bias.shape)}, expected (num_heads, M, M) = "
            f"({num_heads}, {area}, {area}), M the tokens of a window"
        )
    if pad_qkv is not None and pad_qkv.shape != (tripled,):
        raise ValueError(f"pad_qkv has shape {tuple(pad_qkv.shape)}, expected (3*C,) = ({tripled},)")
    for name, x in (("qkv", qkv), ("attn_bias", attn_bias), ("pad_qkv", pad_qkv)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, expected a floating-point dtype")
        if x is not None and x.device != qkv.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of qkv, {qkv.device}")


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    pad_qkv: Tensor | None = None,
    roll_before_pad: bool = False,
) -> Tensor:
    """Attend within the windows of a map, plain or shifted, without cutting the map into windows.

    Each window's tokens attend to one another: softmax(scale q k^T + attn_bias) v, a head at a time. With a shift the
    map is rolled up and left by it first, and keys that come from another side of the map than the query are
    excluded, as Swin's mask does (with -100 there, which is nothing after the softmax). The result is rolled back.

    A map that the window does not divide is padded right and bottom and the result cropped. Padded tokens are not
    masked: they take part as keys and values with `pad_qkv`. Where a layer pads its input with zeros before the
    projection to qkv, as Swin's, Twins' and HiLo's do, that is the projection's bias.

    Products and softmax are computed in float32 (float64 for float64 inputs). Second derivatives are refused.

    Args:
        qkv: queries, keys and values of a map, (B, H, W, 3*C), channels ordered (q, k, v) x head x head_dim; float32,
            float64, bfloat16 or float16, any strides.
        num_heads: heads; head_dim is C / num_heads.
        window_size: side of a window, or (height, width).
        shift_size: cyclic shift, or (vertical, horizontal), smaller than the window.
        attn_bias: added to the scores of every window, (num_heads, M, M) of query and key, M the tokens of a window
            in row-major order; any floating-point dtype.
        scale: factor of the scores, head_dim ** -0.5 if None.
        pad_qkv: queries, keys and values of padded tokens, (3*C,), zeros if None.
        roll_before_pad: what comes first on a map that is padded and shifted. The mask speaks of the padded map, so
            Swin's code for dense prediction pads first (False); timm rolls first (True).

    Returns:
        (B, H, W, C), contiguous, dtype of qkv.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; the message names the argument, its value and
            what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Swin Transformer (arXiv 2103.14030), section 3.2; Twins (arXiv 2104.13840), LSA; HiLo (arXiv 2205.13213),
        section 3.3, Hi-Fi.
    """
    window, shift = _checked_pair(window_size, "window_size"), _checked_pair(shift_size, "shift_size")
    _check(qkv, num_heads, window, shift, attn_bias, pad_qkv)
    if scale is None:
        scale = (qkv.shape[3] // (3 * num_heads)) ** -0.5
    function = window_attention_reference if exporting() else _call
    return function(qkv, num_heads, window, shift, attn_bias, scale, pad_qkv, roll_before_pad)
