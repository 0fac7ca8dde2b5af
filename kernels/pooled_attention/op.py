"""The operators vitzoo::pooled_attention and vitzoo::pooled_attention_bwd, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.pooled_attention import cpu
from vitzoo.kernels.pooled_attention.reference import (
    pooled_attention_reference,
    pooled_attention_reference_bwd,
)

OPERATOR = Operator(
    "pooled_attention",
    backends=(
        triton_support.backend("pooled_attention", triton_support.narrow_why_not("q")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": pooled_attention_reference, "backward": pooled_attention_reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


def _flops(q: Any, kv: Any, *args: Any) -> int:
    return 4 * q[0] * q[1] * q[2] * q[3] * kv[1] * kv[2]


def _backward_flops(dout: Any, *inputs: Any) -> int:
    # the scores again, and two products for each of the two of the forward pass
    return _flops(*inputs) * 5 // 2


_call = register(
    OPERATOR,
    "Tensor q, Tensor kv, int num_heads, float scale",
    ("out",),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    autocast_cast=("q", "kv"),
)


def _check(q: Tensor, kv: Tensor, num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, expected a positive number")
    if q.ndim != 4 or q.shape[3] == 0 or q.shape[3] % num_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, expected (B, H, W, C) with C a multiple of num_heads {num_heads}"
        )
    if kv.ndim != 4 or kv.shape[0] != q.shape[0] or kv.shape[3] != 2 * q.shape[3]:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}, expected (B, h, w, 2*C) = ({q.shape[0]}, h, w, {2 * q.shape[3]})"
        )
    if kv.shape[1] < 1 or kv.shape[2] < 1:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, expected a map of at least one position")
    for name, x in (("q", q), ("kv", kv)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, expected a floating-point dtype")
    if kv.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"kv is {kv.dtype}, expected the dtype of q, {q.dtype}")
    if kv.device != q.device:
        raise ValueError(f"kv is on {kv.device}, expected the device of q, {q.device}")


def pooled_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Let every position of a map attend to every position of another, usually smaller one.

    out = softmax(scale q k^T) v, a head at a time, read from and written to maps as they stand. Products and softmax
    are computed in float32 (float64 for float64 inputs) and no matrix of all scores exists. Second derivatives are
    refused.

    Args:
        q: queries, (B, H, W, C), channels ordered head x head_dim; float32, float64, bfloat16 or float16.
        kv: keys and values, (B, h, w, 2*C), channels ordered (k, v) x head x head_dim, of the same dtype.
        num_heads: heads; head_dim is C / num_heads.
        scale: factor of the scores, head_dim ** -0.5 if None.

    Returns:
        (B, H, W, C), contiguous, dtype of q.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; the message names the argument, its value and
            what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: HiLo (arXiv 2205.13213), section 3.3, Lo-Fi; PVT (arXiv 2102.12122), section 3.3, spatial-reduction
        attention.
    """
    _check(q, kv, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    function = pooled_attention_reference if exporting() else _call
    return function(q, kv, num_heads, scale)
