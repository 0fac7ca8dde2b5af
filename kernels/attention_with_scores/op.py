"""The operators vitzoo::attention_with_scores and vitzoo::attention_with_scores_bwd, and the public function.

The operator's output is (B, L, heads, head_dim), which the projection behind it reads as it stands; the function
returns it seen as (B, heads, L, head_dim).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.attention_with_scores import cpu, reference
from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.attention.reference import compute_dtype
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register

OPERATOR = Operator(
    "attention_with_scores",
    backends=(
        triton_support.backend("attention_with_scores", triton_support.narrow_why_not("q")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": reference.forward, "backward": reference.backward},
            lambda *args: None,
        ),
    ),
)


def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = q.shape
    return (
        q.new_empty((batch, length, heads, head_dim)),
        q.new_empty((batch, length - 1), dtype=compute_dtype(q)),
    )


def _flops(q: Any, *args: Any) -> int:
    return 4 * q[0] * q[1] * q[2] * q[2] * q[3]


def _backward_flops(dout: Any, dscores: Any, *inputs: Any) -> int:
    # the scores again, and two products for each of the two of the forward pass
    return _flops(*inputs) * 5 // 2


_call = register(
    OPERATOR,
    "Tensor q, Tensor k, Tensor v, float scale",
    ("out", "scores"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    autocast_cast=("q", "k", "v"),
)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape[1] < 1 or q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, expected (B, heads, L, head_dim), the class token first"
        )
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, expected a floating-point dtype")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of q, {tuple(q.shape)}")
        if not x.is_floating_point() or (x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type)):
            raise ValueError(f"{name} is {x.dtype}, expected the dtype of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of q, {q.device}")


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend, and return how much the class token attends to every other token, without forming the matrix.

    out = softmax(scale q k^T) v; the scores are the class token's row of that softmax without its own column, averaged
    over heads, not normalised again. Both have gradients; second derivatives are refused. Products and softmax are
    computed in float32 (float64 for float64 inputs).

    Args:
        q: queries, (B, heads, L, head_dim), class token first; float32, float64, bfloat16 or float16, any strides.
        k: keys, likewise.
        v: values, likewise.
        scale: factor of the products, head_dim ** -0.5 if None.

    Returns:
        out, (B, heads, L, head_dim), dtype of q, a view of contiguous (B, L, heads, head_dim); and scores, (B, L - 1),
        float32, float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names the argument, its value and what was
            expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: EViT (arXiv 2202.07800), equation 3 and section 3.2.
    """
    _check(q, k, v)
    if scale is None:
        scale = q.shape[3] ** -0.5
    function = reference.forward if exporting() else _call
    out, scores = function(q, k, v, scale)
    return out.transpose(1, 2), scores
