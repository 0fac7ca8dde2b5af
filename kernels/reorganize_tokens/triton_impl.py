"""Token reorganization in Triton: torch sorts the scores, then one program an output row copies or fuses."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitzoo.kernels.reorganize_tokens.cpu import token_count
from vitzoo.kernels.reorganize_tokens.reference import best


@triton.jit
def _reorganize_tokens_fwd_kernel(
    x_ptr, rest_ptr, index_ptr, tokens_ptr,
    length, channels, keep, out_length,
    stride_x_b, stride_x_l, stride_x_c,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    x = x_ptr + batch * stride_x_b + c * stride_x_c
    out = tokens_ptr + (batch * out_length + row) * channels + c
    if row <= keep:
        source = tl.load(index_ptr + batch * keep + row - 1, mask=row > 0, other=-1) + 1
        tl.store(out, tl.load(x + source * stride_x_l, mask=mask), mask=mask)
    else:
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for t in range(1, length):
            score = tl.load(rest_ptr + batch * (length - 1) + t - 1)
            if score != 0.0:  # what was kept has zero here
                total += score * tl.load(x + t * stride_x_l, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, total.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reorganize_tokens_bwd_kernel(
    dtokens_ptr, x_ptr, scores_ptr, place_ptr, dx_ptr, dscores_ptr,
    length, channels, out_length,
    stride_x_b, stride_x_l, stride_x_c,
    FUSED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    score_at = batch * (length - 1) + token - 1
    # the row of dtokens that x_token went to; -1 where it was dropped
    place = tl.load(place_ptr + score_at, mask=token > 0, other=0)
    score = tl.load(scores_ptr + score_at, mask=token > 0, other=0.0)
    row = tl.where(place >= 0, place, out_length - 1)
    factor = tl.where(place >= 0, 1.0, score if FUSED else 0.0)
    product = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < channels
        d = tl.load(dtokens_ptr + (batch * out_length + row) * channels + c, mask=mask, other=0.0).to(
            tl.float32
        )
        out = dx_ptr + (batch * length + token) * channels + c
        tl.store(out, (d * factor).to(dx_ptr.dtype.element_ty), mask=mask)
        if FUSED:
            x = tl.load(
                x_ptr + batch * stride_x_b + token * stride_x_l + c * stride_x_c, mask=mask, other=0.0
            )
            product += d * x.to(tl.float32)
    dscore = tl.where(place >= 0, 0.0, tl.sum(product, axis=0))
    tl.store(dscores_ptr + score_at, dscore, mask=token > 0)


def forward(x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """Return (tokens, indices)."""
    batch, length, channels = x.shape
    indices = best(scores, keep).contiguous()
    count = token_count(length, keep, fuse)
    tokens = torch.empty((batch, count, channels), dtype=x.dtype, device=x.device)
    block = min(512, triton.next_power_of_2(channels))
    _reorganize_tokens_fwd_kernel[(count, triton.cdiv(channels, block), batch)](
        x, scores.float().scatter(1, indices, 0.0), indices, tokens, length, channels, keep, count,
        *x.stride(), BLOCK_C=block,
    )  # fmt: skip
    return tokens, indices


def backward(
    dtokens: Tensor, indices: Tensor, x: Tensor, scores: Tensor, keep: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and scores."""
    batch, length, channels = x.shape
    rows = torch.arange(1, keep + 1, device=x.device).expand(batch, -1)
    place = torch.full(scores.shape, -1, dtype=torch.int64, device=x.device).scatter(1, indices, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscores = torch.empty(scores.shape, dtype=torch.float32, device=x.device)
    _reorganize_tokens_bwd_kernel[(length, batch)](
        dtokens.contiguous(), x, scores.float().contiguous(), place, dx, dscores, length, channels,
        dtokens.shape[1], *x.stride(), FUSED=dtokens.shape[1] > 1 + keep,
        BLOCK_C=min(512, triton.next_power_of_2(channels)),
    )  # fmt: skip
    return dx, dscores


def _ahead(kernel: Any, kind: str) -> Any:
    """Return one entry of AHEAD."""
    constexprs = {"BLOCK_C": 512, "FUSED": True}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    integers, wide = ("index_ptr", "place_ptr"), ("rest_ptr", "scores_ptr", "dscores_ptr")
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in integers else "*fp32" if name in wide else f"*{kind}"
        else:
            signature[name] = "i32"
    return kernel, signature, constexprs, 4


AHEAD = tuple(
    _ahead(kernel, kind)
    for kernel in (_reorganize_tokens_fwd_kernel, _reorganize_tokens_bwd_kernel)
    for kind in ("fp32", "bf16")
)
