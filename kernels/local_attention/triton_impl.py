"""local_attention in Triton: a program holds a head's channels of a block of positions and walks over the window.

Forward keeps a running softmax. Backward finds each position's largest logit, sum and mean gradient, then dq; dk and dv
are gathered at the key from the queries that look at it, so nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shifted(
    row, column, inside, height, width, i, j, DILATION: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr
):
    """Return place and presence of window position (i, j) of each position."""
    y = row + i * DILATION - DILATION * (KH - 1) // 2
    x = column + j * DILATION - DILATION * (KW - 1) // 2
    return y * width + x, inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _tile(ptr, c, place, channels, image, mask):
    """Load (channels, positions) as float32, zero where `mask` is not set."""
    at = ptr + c[:, None] * image + place[None, :]
    return tl.load(at, mask=(c < channels)[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _local_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scale,
    channels,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    image = height * width
    head = tl.program_id(0).to(tl.int64) * channels * image
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    row, column, inside = t // width, t % width, t < image
    q = _tile(q_ptr + head, c, t, channels, image, inside)
    largest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    out = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    for i in range(KH):
        for j in range(KW):
            place, there = _shifted(row, column, inside, height, width, i, j, DILATION, KH, KW)
            logit = scale * tl.sum(q * _tile(k_ptr + head, c, place, channels, image, there), axis=0)
            above = tl.maximum(largest, logit)
            kept, weight = tl.exp(largest - above), tl.exp(logit - above)
            total = total * kept + weight
            out = out * kept[None, :] + weight[None, :] * _tile(
                v_ptr + head, c, place, channels, image, there
            )
            largest = above
    at = out_ptr + head + c[:, None] * image + t[None, :]
    out = out / total[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(c < channels)[:, None] & inside[None, :])


@triton.jit
def _local_attention_bwd_q_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    largest_ptr,
    total_ptr,
    mean_ptr,
    scale,
    channels,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    image = height * width
    head = tl.program_id(0).to(tl.int64)
    start = head * channels * image
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    row, column, inside = t // width, t % width, t < image
    q = _tile(q_ptr + start, c, t, channels, image, inside)
    dout = _tile(dout_ptr + start, c, t, channels, image, inside)
    largest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for i in range(KH):
        for j in range(KW):
            place, there = _shifted(row, column, inside, height, width, i, j, DILATION, KH, KW)
            logit = scale * tl.sum(q * _tile(k_ptr + start, c, place, channels, image, there), axis=0)
            gradient = tl.sum(dout * _tile(v_ptr + start, c, place, channels, image, there), axis=0)
            above = tl.maximum(largest, logit)
            kept, weight = tl.exp(largest - above), tl.exp(logit - above)
            total = total * kept + weight
            mean = mean * kept + weight * gradient
            largest = above
    mean = mean / total
    dq = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    for i in range(KH):
        for j in range(KW):
            place, there = _shifted(row, column, inside, height, width, i, j, DILATION, KH, KW)
            k = _tile(k_ptr + start, c, place, channels, image, there)
            weight = tl.exp(scale * tl.sum(q * k, axis=0) - largest) / total
            gradient = tl.sum(dout * _tile(v_ptr + start, c, place, channels, image, there), axis=0)
            dq += (scale * weight * (gradient - mean))[None, :] * k
    tl.store(largest_ptr + head * image + t, largest, mask=inside)
    tl.store(total_ptr + head * image + t, total, mask=inside)
    tl.store(mean_ptr + head * image + t, mean, mask=inside)
    at = dq_ptr + start + c[:, None] * image + t[None, :]
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=(c < channels)[:, None] & inside[None, :])


@triton.jit
def _local_attention_bwd_kv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    largest_ptr,
    total_ptr,
    mean_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    channels,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    image = height * width
    head = tl.program_id(0).to(tl.int64)
    start = head * channels * image
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    row, column, inside = t // width, t % width, t < image
    k = _tile(k_ptr + start, c, t, channels, image, inside)
    v = _tile(v_ptr + start, c, t, channels, image, inside)
    dk = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    dv = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    for i in range(KH):
        for j in range(KW):
            # a window is symmetric: the queries that see a key lie in its own window
            place, there = _shifted(row, column, inside, height, width, i, j, DILATION, KH, KW)
            q = _tile(q_ptr + start, c, place, channels, image, there)
            dout = _tile(dout_ptr + start, c, place, channels, image, there)
            largest = tl.load(largest_ptr + head * image + place, mask=there, other=0.0)
            total = tl.load(total_ptr + head * image + place, mask=there, other=1.0)
            mean = tl.load(mean_ptr + head * image + place, mask=there, other=0.0)
            weight = tl.exp(scale * tl.sum(q * k, axis=0) - largest) / total
            gradient = tl.sum(dout * v, axis=0)
            dk += (scale * weight * (gradient - mean))[None, :] * q
            dv += weight[None, :] * dout
    at, mask = c[:, None] * image + t[None, :], (c < channels)[:, None] & inside[None, :]
    tl.store(dk_ptr + start + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + start + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _launch(
    q: Tensor, kernel_size: Sequence[int], dilation: int, num_heads: int
) -> tuple[Any, tuple[int, ...], Any]:
    batch, dim, height, width = q.shape
    channels = dim // num_heads
    block_c = triton.next_power_of_2(channels)
    block_t = max(16, min(128, 4096 // block_c, triton.next_power_of_2(height * width)))
    constants = {"KH": kernel_size[0], "KW": kernel_size[1], "DILATION": dilation}
    constants |= {"BLOCK_C": block_c, "BLOCK_T": block_t}
    grid = (batch * num_heads, triton.cdiv(height * width, block_t))
    return grid, (channels, height, width), constants


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    dilation: int,
    scale: float,
    num_heads: int,
) -> Tensor:
    """Return the output."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    grid, sizes, constants = _launch(q, kernel_size, dilation, num_heads)
    out = torch.empty_like(q)
    _local_attention_fwd_kernel[grid](q, k, v, out, scale, *sizes, **constants)
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    dilation: int,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v."""
    dout, q, k, v = (x.contiguous() for x in (dout, q, k, v))
    grid, sizes, constants = _launch(q, kernel_size, dilation, num_heads)
    shape = (q.shape[0], num_heads, *q.shape[2:])
    maps = [torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(3)]
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    _local_attention_bwd_q_kernel[grid](dout, q, k, v, dq, *maps, scale, *sizes, **constants)
    _local_attention_bwd_kv_kernel[grid](dout, q, k, v, *maps, dk, dv, scale, *sizes, **constants)
    return dq, dk, dv


def _ahead(kernel: Any, dtype: str, names: str) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    wide = {"largest", "total", "mean"}
    signature = {f"{name}_ptr": "*fp32" if name in wide else f"*{dtype}" for name in names.split()}
    signature |= {"scale": "fp32", "channels": "i32", "height": "i32", "width": "i32"}
    constants = {"KH": 3, "KW": 3, "DILATION": 1, "BLOCK_C": 32, "BLOCK_T": 128}
    signature |= dict.fromkeys(constants, "constexpr")
    return kernel, signature, constants, 4


AHEAD = tuple(
    _ahead(kernel, dtype, names)
    for dtype in ("fp32", "bf16")
    for kernel, names in (
        (_local_attention_fwd_kernel, "q k v out"),
        (_local_attention_bwd_q_kernel, "dout q k v dq largest total mean"),
        (_local_attention_bwd_kv_kernel, "dout q k v largest total mean dk dv"),
    )
)
