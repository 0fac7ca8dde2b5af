"""int8_linear in Triton: one kernel turns rows of x into codes, one multiplies, scales, activates and requantizes.

Codes are int8 throughout, uint8 ones 128 lower, like their zero point. Fusing products with sums is switched off, and
division is correctly rounded: codes and outputs are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitzoo.kernels.int8_linear.reference import out_dtype


@triton.jit
def _rounded(x):
    # to nearest, ties to even, for |x| below 2^22
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _codes(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    steps = tl.div_rn(x, scale)
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -1024.0), 1024.0)
    return tl.minimum(tl.maximum(_rounded(steps) + zero, LOW), HIGH).to(tl.int32)


@triton.jit
def _int8_linear_quantize_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    row_scale_ptr,
    depth,
    stride_x_m,
    stride_scale,
    DYNAMIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    zero = tl.load(zero_ptr).to(tl.float32)
    if DYNAMIC:
        # as integers, magnitudes are in the same order and NaN is above infinity
        largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for start in range(0, depth, BLOCK_K):
            x = tl.load(x_ptr + row * stride_x_m + start + k, mask=start + k < depth, other=0.0).to(
                tl.float32
            )
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        magnitude = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(tl.where(magnitude < 1e-30, 1e-30, magnitude), 127.0)
    else:
        scale = tl.load(scale_ptr + row * stride_scale)
    tl.store(row_scale_ptr + row, scale)
    for start in range(0, depth, BLOCK_K):
        x = tl.load(x_ptr + row * stride_x_m + start + k, mask=start + k < depth, other=0.0).to(tl.float32)
        codes = _codes(x, scale, zero, -128.0, 127.0)
        tl.store(codes_ptr + row * depth + start + k, codes.to(tl.int8), mask=start + k < depth)


@triton.jit
def _int8_linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    row_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    zero_ptr,
    weight_sum_ptr,
    out_scale_ptr,
    out_zero_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    stride_x_m,
    stride_scale,
    X_UNSIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_CODES: tl.constexpr,
    OUT_LOW: tl.constexpr,
    OUT_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_columns = m < rows, n < columns
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        in_depth = start + k < depth
        x_at = x_ptr + m[:, None] * stride_x_m + (start + k)[None, :]
        x = tl.load(x_at, mask=in_rows[:, None] & in_depth[None, :], other=0)
        if X_UNSIGNED:
            x = (x.to(tl.int32) - 128).to(tl.int8)
        # beyond the depth the weight is zero, so whatever x is there counts for nothing
        weight_at = weight_ptr + n[None, :] * depth + (start + k)[:, None]
        weight = tl.load(weight_at, mask=in_columns[None, :] & in_depth[:, None], other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
    if HAS_ZERO:
        sums -= tl.load(zero_ptr) * tl.load(weight_sum_ptr + n, mask=in_columns, other=0)[None, :]
    row_scale = tl.load(row_scale_ptr + m * stride_scale, mask=in_rows, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=in_columns, other=0.0)
    y = sums.to(tl.float32) * (row_scale[:, None] * weight_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=in_columns, other=0.0)[None, :]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    if OUT_CODES:
        y = _codes(y, tl.load(out_scale_ptr), tl.load(out_zero_ptr).to(tl.float32), OUT_LOW, OUT_HIGH)
    out_at = out_ptr + m[:, None] * columns + n[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def blocks(rows: int, columns: int, depth: int) -> dict[str, int]:
    """Return the tile of a program; small where the matrices are."""

    def least(size: int, most: int) -> int:
        return max(16, min(most, triton.next_power_of_2(size)))

    return {
        "BLOCK_M": least(rows, 128),
        "BLOCK_N": least(columns, 128),
        "BLOCK_K": max(32, least(depth, 64)),
    }


def _quantize(rows: Tensor, scale: Tensor | None, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of rows (M, K), int8, and the scale of each row."""
    count, depth = rows.shape
    codes = torch.empty((count, depth), dtype=torch.int8, device=rows.device)
    row_scale = torch.empty((count,), dtype=torch.float32, device=rows.device)
    _int8_linear_quantize_kernel[(count,)](
        rows,
        row_scale if scale is None else scale,
        zero,
        codes,
        row_scale,
        depth,
        rows.stride(0),
        0 if scale is None or scale.numel() == 1 else 1,
        DYNAMIC=scale is None,
        BLOCK_K=min(1024, triton.next_power_of_2(depth)),
        enable_fp_fusion=False,
    )
    return codes, row_scale


def forward(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    activation: str | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Return the output."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    weight = weight_int8.contiguous()
    columns, depth = weight.shape
    unsigned = x_zero_point is not None and x_zero_point.dtype == torch.uint8
    zero = torch.zeros((), dtype=torch.int32, device=x.device)
    if x_zero_point is not None:
        zero = x_zero_point.to(torch.int32) - (128 if unsigned else 0)
    scale = None if x_scale is None else x_scale.float().reshape(-1)
    codes = rows
    if x.is_floating_point():
        codes, scale = _quantize(rows, scale, zero)
    dtype = out_dtype(x, weight_scale)
    if out_scale is not None:
        dtype = torch.int8 if out_zero_point is None else out_zero_point.dtype
    out = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    info = torch.iinfo(dtype) if out_scale is not None else torch.iinfo(torch.int8)
    has_zero = x_zero_point is not None
    tile = blocks(rows.shape[0], columns, depth)
    grid = (triton.cdiv(rows.shape[0], tile["BLOCK_M"]), triton.cdiv(columns, tile["BLOCK_N"]))
    _int8_linear_fwd_kernel[grid](
        codes,
        weight,
        scale,
        weight_scale.float().contiguous(),
        zero if bias is None else bias.float().contiguous(),
        zero,
        weight.sum(1, dtype=torch.int32) if has_zero else zero,
        zero if out_scale is None else out_scale.float(),
        zero if out_zero_point is None else out_zero_point.to(torch.int32),
        out,
        rows.shape[0],
        columns,
        depth,
        codes.stride(0),
        0 if scale.numel() == 1 else 1,
        X_UNSIGNED=codes.dtype == torch.uint8,
        HAS_BIAS=bias is not None,
        HAS_ZERO=has_zero,
        ACTIVATION=activation or "none",
        OUT_CODES=out_scale is not None,
        OUT_LOW=float(info.min),
        OUT_HIGH=float(info.max),
        **tile,
        num_warps=8 if tile["BLOCK_M"] * tile["BLOCK_N"] >= 128 * 128 else 4,
        enable_fp_fusion=False,
    )
    return out


def _ahead_quantize(dtype: str) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    signature = {"x_ptr": f"*{dtype}", "scale_ptr": "*fp32", "zero_ptr": "*i32", "codes_ptr": "*i8"}
    signature |= {"row_scale_ptr": "*fp32", "depth": "i32", "stride_x_m": "i32", "stride_scale": "i32"}
    constants = {"DYNAMIC": True, "BLOCK_K": 512}
    signature |= dict.fromkeys(constants, "constexpr")
    return _int8_linear_quantize_kernel, signature, constants, 4


def _ahead_fwd(x: str, out: str, codes: bool) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    signature = {"x_ptr": f"*{x}", "weight_ptr": "*i8"}
    signature |= dict.fromkeys(("row_scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
    signature |= {
        "zero_ptr": "*i32",
        "weight_sum_ptr": "*i32",
        "out_scale_ptr": "*fp32",
        "out_zero_ptr": "*i32",
    }
    signature |= {"out_ptr": f"*{out}"}
    signature |= dict.fromkeys(("rows", "columns", "depth", "stride_x_m", "stride_scale"), "i32")
    constants = {"X_UNSIGNED": x == "u8", "HAS_BIAS": True, "HAS_ZERO": True, "ACTIVATION": "gelu"}
    constants |= {"OUT_CODES": codes, "OUT_LOW": -128.0, "OUT_HIGH": 127.0}
    constants |= {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    signature |= dict.fromkeys(constants, "constexpr")
    return _int8_linear_fwd_kernel, signature, constants, 8


AHEAD = (
    _ahead_quantize("fp32"),
    _ahead_quantize("bf16"),
    _ahead_fwd("i8", "fp32", False),
    _ahead_fwd("i8", "bf16", False),
    _ahead_fwd("u8", "i8", True),
)
