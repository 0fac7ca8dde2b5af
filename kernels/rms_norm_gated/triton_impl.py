"""The gated RMS norm in Triton: one program a row forward, one a stretch of rows backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256  # programs of the backward pass, each with its own sums for the weight


@triton.jit
def _rms_norm_gated_fwd_kernel(
    x_ptr, weight_ptr, z_ptr, out_ptr,
    channels, eps,
    HAS_Z: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * channels
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    y = tl.load(x_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
    gate = y
    if HAS_Z:
        z = tl.load(z_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
        gate = z * tl.sigmoid(z)
        if not NORM_FIRST:
            y *= gate
    rstd = 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / channels + eps)
    y = y * rstd * tl.load(weight_ptr + c, mask=mask, other=0.0)
    if HAS_Z and NORM_FIRST:
        y *= gate
    tl.store(out_ptr + row + c, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_gated_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, z_ptr, dx_ptr, dweight_ptr, dz_ptr,
    rows, channels, part_rows, eps,
    HAS_Z: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for i in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows)):
        row = i * channels
        x = tl.load(x_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dout_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
        y = x
        gate = x
        slope = x
        if HAS_Z:
            z = tl.load(z_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(z)
            gate = z * s
            slope = s * (1 + z * (1 - s))
            if not NORM_FIRST:
                y = x * gate
        rstd = 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / channels + eps)
        hat = y * rstd
        if HAS_Z and NORM_FIRST:
            dz = d * hat * weight * slope
            tl.store(dz_ptr + row + c, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            d *= gate
        dweight += d * hat
        g = d * weight
        dy = (g - hat * (tl.sum(g * hat, axis=0) / channels)) * rstd
        if HAS_Z and not NORM_FIRST:
            dz = dy * x * slope
            tl.store(dz_ptr + row + c, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dy *= gate
        tl.store(dx_ptr + row + c, dy.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + part * channels + c, dweight, mask=mask)


def _options(channels: int, z: Tensor | None, norm_before_gate: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(channels)
    return {
        "HAS_Z": z is not None,
        "NORM_FIRST": norm_before_gate,
        "BLOCK_C": block,
        "num_warps": min(16, max(1, block // 256)),
    }


def forward(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, norm_before_gate: bool) -> Tensor:
    """Return out."""
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm_gated_fwd_kernel[(x.numel() // channels,)](
        x.contiguous(), weight.float().contiguous(), None if z is None else z.contiguous(), out, channels, eps,
        **_options(channels, z, norm_before_gate),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, norm_before_gate: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and z; None for an absent z."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    part_rows = -(-rows // PARTS)
    parts = -(-rows // part_rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    dweight = torch.empty((parts, channels), dtype=torch.float32, device=x.device)
    _rms_norm_gated_bwd_kernel[(parts,)](
        dout.contiguous(), x.contiguous(), weight.float().contiguous(), None if z is None else z.contiguous(),
        dx, dweight, dz, rows, channels, part_rows, eps, **_options(channels, z, norm_before_gate),
    )  # fmt: skip
    return dx, dweight.sum(0), dz


def _ahead(kernel: Any, kind: str, norm_first: bool) -> Any:
    """Return one entry of AHEAD; weight and its gradient are float32, the other tensors have the dtype of x."""
    constexprs = {"HAS_Z": True, "NORM_FIRST": norm_first, "BLOCK_C": 512}
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if "weight" in name else f"*{kind}"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    return kernel, signature, constexprs, 2


AHEAD = tuple(
    _ahead(kernel, kind, norm_first)
    for kernel in (_rms_norm_gated_fwd_kernel, _rms_norm_gated_bwd_kernel)
    for kind in ("fp32", "bf16")
    for norm_first in (False, True)
)
