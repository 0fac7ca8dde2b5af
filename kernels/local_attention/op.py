"""The operators vitzoo::local_attention and vitzoo::local_attention_bwd, and the public function."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.local_attention import cpu
from vitzoo.kernels.local_attention.reference import (
    local_attention_reference,
    local_attention_reference_bwd,
)

OPERATOR = Operator(
    "local_attention",
    backends=(
        triton_support.backend("local_attention", triton_support.narrow_why_not("q")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": local_attention_reference, "backward": local_attention_reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


def _flops(q: Any, k: Any, v: Any, kernel_size: Any, *args: Any) -> int:
    # two products of C numbers a window position
    return 4 * prod(q) * kernel_size[0] * kernel_size[1]


def _backward_flops(dout: Any, q: Any, k: Any, v: Any, kernel_size: Any, *args: Any) -> int:
    # the logits again, and the gradients of weights, q, k and v
    return 10 * prod(q) * kernel_size[0] * kernel_size[1]


_call = register(
    OPERATOR,
    "Tensor q, Tensor k, Tensor v, int[] kernel_size, int dilation, float scale, int num_heads",
    ("out",),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    autocast_cast=("q", "k", "v"),
)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int = 1,
    scale: float = 1.0,
    num_heads: int = 1,
) -> Tensor:
    """Attend from each position to the kh x kw positions around it, without unfolding the windows.

    out[h, w] = sum_ij softmax_ij(scale q[h, w] . k[y, x]) v[y, x] with y = h + dilation (i - (kh - 1) / 2), likewise x.
    Positions beyond the map are zero keys and zero values that take part: they get the logit 0 and damp the border.

    Logits, softmax and sums are float32 for inputs of at most 32 bits, float64 for float64. Every input has a gradient;
    second derivatives are refused. Autocast casts q, k and v to its dtype.

    Args:
        q: queries, (B, C, H, W), float32, float64, bfloat16 or float16.
        k: keys, (B, C, H, W).
        v: values, (B, C, H, W).
        kernel_size: side of the window, or (kh, kw); odd.
        dilation: steps between window positions.
        scale: factor of the logits.
        num_heads: C is split into so many groups of neighbouring channels; each attends by itself.

    Returns:
        (B, C, H, W), contiguous, dtype of q.

    Raises:
        ValueError: a shape, dtype, device or size that does not fit; the message names the argument, its value and what
            was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: TiC (arXiv 2310.04134); zs670980918/MSA-Conv 2d96f547, the two window operators.
    """
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, C, H, W)")
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, expected a floating-point dtype")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of q, {tuple(q.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, expected the dtype of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of q, {q.device}")
    sizes = [kernel_size, kernel_size] if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != 2 or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_size is {kernel_size}, expected an odd positive number or two")
    if dilation < 1:
        raise ValueError(f"dilation is {dilation}, expected a positive number")
    if num_heads < 1 or q.shape[1] % num_heads != 0:
        raise ValueError(f"num_heads is {num_heads}, expected a positive divisor of C = {q.shape[1]}")
    if exporting():
        return local_attention_reference(q, k, v, sizes, dilation, scale, num_heads)
    return _call(q, k, v, sizes, dilation, scale, num_heads)
