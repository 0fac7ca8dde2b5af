"""Cross-scan and cross-merge in Triton: one read and four writes, or four reads and one write, of each pixel.

A program takes a square tile of one (H, W) plane. Rows are read and written along W, and the transposed tile along H,
so that both orders move whole sectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# the dtype of sums
_WIDE = {torch.float64: tl.float64}


@triton.jit
def _cross_scan_kernel(
    x_ptr, out_ptr, H, W, stride_x_b, stride_x_c, stride_x_h, stride_x_w, channels, BLOCK: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    batch, channel = plane // channels, plane % channels
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < H) & (columns[None, :] < W)
    x_ptr += batch * stride_x_b + channel * stride_x_c
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x_h + columns[None, :] * stride_x_w, mask=inside)
    size = tl.cast(H * W, tl.int64)
    step = channels * size  # between routes
    out_ptr += batch * 4 * step + channel * size
    along = rows[:, None] * W + columns[None, :]
    tl.store(out_ptr + along, x, mask=inside)
    tl.store(out_ptr + 2 * step + (size - 1 - along), x, mask=inside)
    across = columns[:, None] * H + rows[None, :]
    inside = (columns[:, None] < W) & (rows[None, :] < H)
    x = tl.trans(x)
    tl.store(out_ptr + step + across, x, mask=inside)
    tl.store(out_ptr + 3 * step + (size - 1 - across), x, mask=inside)


@triton.jit
def _cross_merge_kernel(
    y_ptr,
    out_ptr,
    H,
    W,
    stride_y_b,
    stride_y_k,
    stride_y_c,
    stride_y_l,
    channels,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    batch, channel = plane // channels, plane % channels
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(H * W, tl.int64)
    y_ptr += batch * stride_y_b + channel * stride_y_c
    across = columns[:, None] * H + rows[None, :]
    inside = (columns[:, None] < W) & (rows[None, :] < H)
    there = tl.load(y_ptr + stride_y_k + across.to(tl.int64) * stride_y_l, mask=inside, other=0.0)
    back = tl.load(y_ptr + 3 * stride_y_k + (size - 1 - across) * stride_y_l, mask=inside, other=0.0)
    columnwise = tl.trans(there.to(WIDE) + back.to(WIDE))
    along = rows[:, None] * W + columns[None, :]
    inside = (rows[:, None] < H) & (columns[None, :] < W)
    there = tl.load(y_ptr + along.to(tl.int64) * stride_y_l, mask=inside, other=0.0)
    back = tl.load(y_ptr + 2 * stride_y_k + (size - 1 - along) * stride_y_l, mask=inside, other=0.0)
    total = there.to(WIDE) + back.to(WIDE) + columnwise
    tl.store(out_ptr + plane * size + along, total.to(out_ptr.dtype.element_ty), mask=inside)


def _block(height: int, width: int) -> int:
    return 32 if max(height, width) > 16 else 16


def _grid(batch: int, channels: int, height: int, width: int) -> tuple[int, int, int]:
    block = _block(height, width)
    return batch * channels, triton.cdiv(height, block), triton.cdiv(width, block)


def scan(x: Tensor) -> Tensor:
    """Return the four sequences of a map with any strides."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, 4, channels, height * width), dtype=x.dtype, device=x.device)
    grid = _grid(batch, channels, height, width)
    _cross_scan_kernel[grid](x, out, height, width, *x.stride(), channels, BLOCK=_block(height, width))
    return out


def merge(y: Tensor, H: int, W: int) -> Tensor:
    """Return the map that four sequences with any strides add up to."""
    batch, _, channels, _ = y.shape
    out = torch.empty((batch, channels, H, W), dtype=y.dtype, device=y.device)
    _cross_merge_kernel[_grid(batch, channels, H, W)](
        y, out, H, W, *y.stride(), channels, WIDE=_WIDE.get(y.dtype, tl.float32), BLOCK=_block(H, W)
    )
    return out


def scan_backward(dout: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x."""
    return merge(dout, x.shape[2], x.shape[3])


def merge_backward(dout: Tensor, y: Tensor, H: int, W: int) -> Tensor:
    """Return the gradient of y."""
    return scan(dout)


def _ahead(dtype: str) -> tuple:
    sizes = dict.fromkeys(("H", "W", "channels"), "i32")
    tail = {"out_ptr": f"*{dtype}", "BLOCK": "constexpr"}
    values = {"BLOCK": 32}
    scan_strides = dict.fromkeys((f"stride_x_{axis}" for axis in "bchw"), "i64")
    merge_strides = dict.fromkeys((f"stride_y_{axis}" for axis in "bkcl"), "i64")
    return (
        (_cross_scan_kernel, {"x_ptr": f"*{dtype}"} | scan_strides | sizes | tail, values, 4),
        (
            _cross_merge_kernel,
            {"y_ptr": f"*{dtype}"} | merge_strides | sizes | tail | {"WIDE": "constexpr"},
            values | {"WIDE": tl.float32},
            4,
        ),
    )


AHEAD = (*_ahead("fp32"), *_ahead("bf16"))
