"""tv_conv2d in Triton: a program holds a block of positions of one channel for several images.

The weight map, larger than the output of an image, is then read once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitzoo.kernels.tv_conv2d.reference import kernel_side


@triton.jit
def _tv_conv2d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    batch,
    channels,
    height,
    width,
    out_height,
    out_width,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(2).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    plane = out_height * out_width
    row, column, inside, images = t // out_width, t % out_width, t < plane, b < batch
    sums = tl.zeros((BLOCK_B, BLOCK_T), dtype=tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + channel * plane + t, mask=inside, other=0.0).to(tl.float32)[None, :]
    for i in range(SIDE):
        for j in range(SIDE):
            y, x = row * STRIDE + i - SIDE // 2, column * STRIDE + j - SIDE // 2
            there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            weight_at = weight_ptr + (channel * SIDE * SIDE + i * SIDE + j) * plane + t
            weight = tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)
            x_at = x_ptr + ((b * channels + channel) * height * width)[:, None] + (y * width + x)[None, :]
            value = tl.load(x_at, mask=images[:, None] & there[None, :], other=0.0).to(tl.float32)
            sums += weight[None, :] * value
    out_at = out_ptr + ((b * channels + channel) * plane)[:, None] + t[None, :]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=images[:, None] & inside[None, :])


@triton.jit
def _tv_conv2d_bwd_weight_kernel(
    dout_ptr,
    x_ptr,
    dweight_ptr,
    dbias_ptr,
    batch,
    channels,
    height,
    width,
    out_height,
    out_width,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(1).to(tl.int64)
    tap = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    plane = out_height * out_width
    row, column, inside = t // out_width, t % out_width, t < plane
    y, x = row * STRIDE + tap // SIDE - SIDE // 2, column * STRIDE + tap % SIDE - SIDE // 2
    there = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    sums = tl.zeros((BLOCK_T,), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        dout_at = dout_ptr + ((b * channels + channel) * plane)[:, None] + t[None, :]
        dout = tl.load(dout_at, mask=(b < batch)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        x_at = x_ptr + ((b * channels + channel) * height * width)[:, None] + (y * width + x)[None, :]
        value = tl.load(x_at, mask=(b < batch)[:, None] & there[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(dout * value, axis=0)
        total += tl.sum(dout, axis=0)
    dweight_at = dweight_ptr + (channel * SIDE * SIDE + tap) * plane + t
    tl.store(dweight_at, sums.to(dweight_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        mask = inside & (tap == 0)
        tl.store(dbias_ptr + channel * plane + t, total.to(dbias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tv_conv2d_bwd_input_kernel(
    dout_ptr,
    weight_ptr,
    dx_ptr,
    batch,
    channels,
    height,
    width,
    out_height,
    out_width,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = tl.program_id(2).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    plane, image = out_height * out_width, height * width
    row, column, inside, images = t // width, t % width, t < image, b < batch
    sums = tl.zeros((BLOCK_B, BLOCK_T), dtype=tl.float32)
    for i in range(SIDE):
        for j in range(SIDE):
            # the output, if there is one, whose tap (i, j) reads this element
            y, x = row + SIDE // 2 - i, column + SIDE // 2 - j
            there = inside & (y >= 0) & (y % STRIDE == 0) & (x >= 0) & (x % STRIDE == 0)
            there = there & (y // STRIDE < out_height) & (x // STRIDE < out_width)
            place = y // STRIDE * out_width + x // STRIDE
            weight_at = weight_ptr + (channel * SIDE * SIDE + i * SIDE + j) * plane + place
            weight = tl.load(weight_at, mask=there, other=0.0).to(tl.float32)
            dout_at = dout_ptr + ((b * channels + channel) * plane)[:, None] + place[None, :]
            dout = tl.load(dout_at, mask=images[:, None] & there[None, :], other=0.0).to(tl.float32)
            sums += weight[None, :] * dout
    dx_at = dx_ptr + ((b * channels + channel) * image)[:, None] + t[None, :]
    tl.store(dx_at, sums.to(dx_ptr.dtype.element_ty), mask=images[:, None] & inside[None, :])


def _tile(batch: int, positions: int) -> dict[str, int]:
    block_b = min(16, triton.next_power_of_2(batch))
    return {
        "BLOCK_B": block_b,
        "BLOCK_T": max(16, min(2048 // block_b, 256, triton.next_power_of_2(positions))),
    }


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Return the output."""
    x, weight = x.contiguous(), weight.contiguous()
    batch, channels, height, width = x.shape
    out_height, out_width = weight.shape[2:]
    out = torch.empty((batch, channels, out_height, out_width), dtype=x.dtype, device=x.device)
    tile = _tile(batch, out_height * out_width)
    grid = (
        triton.cdiv(out_height * out_width, tile["BLOCK_T"]),
        channels,
        triton.cdiv(batch, tile["BLOCK_B"]),
    )
    _tv_conv2d_fwd_kernel[grid](
        *(x, weight, weight if bias is None else bias.contiguous(), out),
        *(batch, channels, height, width, out_height, out_width),
        SIDE=kernel_side(weight),
        STRIDE=stride,
        HAS_BIAS=bias is not None,
        **tile,
    )
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias."""
    dout, x, weight = dout.contiguous(), x.contiguous(), weight.contiguous()
    batch, channels, height, width = x.shape
    sizes = (batch, channels, height, width, *weight.shape[2:])
    positions = weight.shape[2] * weight.shape[3]
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    side, tile = kernel_side(weight), _tile(batch, positions)
    _tv_conv2d_bwd_weight_kernel[(triton.cdiv(positions, tile["BLOCK_T"]), channels, side * side)](
        *(dout, x, dweight, dweight if dbias is None else dbias),
        *sizes,
        SIDE=side,
        STRIDE=stride,
        HAS_BIAS=bias is not None,
        **tile,
    )
    tile = _tile(batch, height * width)
    grid = (triton.cdiv(height * width, tile["BLOCK_T"]), channels, triton.cdiv(batch, tile["BLOCK_B"]))
    _tv_conv2d_bwd_input_kernel[grid](dout, weight, dx, *sizes, SIDE=side, STRIDE=stride, **tile)
    return dx, dweight, dbias


def _ahead(kernel: Any, dtype: str, names: str) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    signature = {f"{name}_ptr": f"*{dtype}" for name in names.split()}
    signature |= dict.fromkeys(("batch", "channels", "height", "width", "out_height", "out_width"), "i32")
    constants: dict[str, Any] = {"SIDE": 3, "STRIDE": 2}
    if kernel is not _tv_conv2d_bwd_input_kernel:
        constants["HAS_BIAS"] = True
    constants |= {"BLOCK_B": 8, "BLOCK_T": 256}
    signature |= dict.fromkeys(constants, "constexpr")
    return kernel, signature, constants, 4


AHEAD = tuple(
    _ahead(kernel, dtype, names)
    for dtype in ("fp32", "bf16")
    for kernel, names in (
        (_tv_conv2d_fwd_kernel, "x weight bias out"),
        (_tv_conv2d_bwd_weight_kernel, "dout x dweight dbias"),
        (_tv_conv2d_bwd_input_kernel, "dout weight dx"),
    )
)
