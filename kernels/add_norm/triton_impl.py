"""The residual norms in Triton: one program a row forward, one a stretch of rows backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256  # programs of the backward pass, each with its own sums for weight and bias


@triton.jit
def _add_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, residual_out_ptr,
    channels, eps,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * channels
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    r = tl.load(x_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r += tl.load(residual_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_out_ptr + row + c, r, mask=mask)
    if CENTER:
        r = tl.where(mask, r - tl.sum(r, axis=0) / channels, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=0) / channels + eps)
    out = r * rstd * tl.load(weight_ptr + c, mask=mask, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + c, mask=mask, other=0.0)
    tl.store(out_ptr + row + c, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_bwd_kernel(
    dout_ptr, dr_ptr, r_ptr, weight_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    rows, channels, part_rows, eps,
    CENTER: tl.constexpr, HAS_DR: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for i in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows)):
        row = i * channels
        r = tl.load(r_ptr + row + c, mask=mask, other=0.0)
        dout = tl.load(dout_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            r = tl.where(mask, r - tl.sum(r, axis=0) / channels, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=0) / channels + eps)
        hat = r * rstd
        dweight += dout * hat
        dbias += dout
        g = dout * weight
        d = g - hat * (tl.sum(g * hat, axis=0) / channels)
        if CENTER:
            d -= tl.sum(g, axis=0) / channels
        d *= rstd
        if HAS_DR:
            d += tl.load(dr_ptr + row + c, mask=mask, other=0.0)
        tl.store(dx_ptr + row + c, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            tl.store(dresidual_ptr + row + c, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + part * channels + c, dweight, mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + part * channels + c, dbias, mask=mask)


def _options(channels: int, center: bool, residual: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    return {
        "CENTER": center,
        "HAS_RESIDUAL": residual is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_C": triton.next_power_of_2(channels),
    }


def _num_warps(channels: int) -> int:
    return min(16, max(1, triton.next_power_of_2(channels) // 256))


def _wide(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.float().contiguous()


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return (out, residual_out)."""
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _add_norm_fwd_kernel[(x.numel() // channels,)](
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        _wide(weight),
        _wide(bias),
        out,
        residual_out,
        channels,
        eps,
        **_options(channels, center, residual, bias),
        num_warps=_num_warps(channels),
    )
    return out, residual_out


def backward(
    dout: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual, weight and bias; None for absent inputs."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    part_rows = -(-rows // PARTS)
    parts = -(-rows // part_rows)
    wide = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    dweight = torch.empty((parts, channels), **wide)
    dbias = None if bias is None else torch.empty((parts, channels), **wide)
    _add_norm_bwd_kernel[(parts,)](
        dout.contiguous(), _wide(dresidual_out), residual_out, _wide(weight), dx, dresidual, dweight, dbias,
        rows, channels, part_rows, eps, HAS_DR=dresidual_out is not None,
        **_options(channels, center, residual, bias), num_warps=_num_warps(channels),
    )  # fmt: skip
    return dx, dresidual, dweight.sum(0), None if dbias is None else dbias.sum(0)


def _ahead(kernel: Any, narrow: tuple[str, ...], kind: str, center: bool) -> Any:
    """Return one entry of AHEAD; pointers in `narrow` have the dtype of x, the others float32."""
    constexprs = {name: 512 if name == "BLOCK_C" else True for name in kernel.arg_names if name.isupper()}
    constexprs["CENTER"] = center
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{kind}" if name in narrow else "*fp32"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    return kernel, signature, constexprs, 2


AHEAD = tuple(
    _ahead(kernel, narrow, kind, center)
    for kernel, narrow in (
        (_add_norm_fwd_kernel, ("x_ptr", "out_ptr")),
        (_add_norm_bwd_kernel, ("dout_ptr", "dx_ptr")),
    )
    for kind in ("fp32", "bf16")
    for center in (False, True)
)
