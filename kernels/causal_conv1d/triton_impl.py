"""Causal convolution in Triton: one program a block of channels and tokens, every sample read through the cache.

With H = WIDTH - 1, y_t = bias + sum_j taps_j x_(t - LEAD + j). Forwards LEAD = H and the taps are the weights; in
reverse LEAD = 0 and the taps are the weights in reverse. x stands for the samples with the initial states before (in
reverse: behind) them, and zeros elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitzoo.kernels.causal_conv1d.states import add_final_gradient, final_states_of


@triton.jit
def _sample(
    x_ptr, init_ptr, stride_l, stride_il, t, d_mask, seqlen,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """Load x_t in float32; x_ptr and init_ptr are columns of pointers to channels, t a row of tokens."""
    inside = (t >= 0) & (t < seqlen)
    x = tl.load(x_ptr + t * stride_l, mask=d_mask & inside, other=0.0).to(tl.float32)
    if HAS_INIT:
        m = seqlen + WIDTH - 2 - t if REVERSE else t + WIDTH - 1
        before = (m >= 0) & (m < WIDTH - 1)
        x += tl.load(init_ptr + m * stride_il, mask=d_mask & before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, init_ptr, out_ptr,
    dim, seqlen,
    stride_x_b, stride_x_d, stride_x_l,
    stride_i_b, stride_i_d, stride_i_l,
    stride_o_b, stride_o_d, stride_o_l,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    d = (tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D))[:, None]
    t = (tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    d_mask = d < dim
    x_row = x_ptr + batch * stride_x_b + d * stride_x_d
    init_row = init_ptr + batch * stride_i_b + d * stride_i_d
    LEAD: tl.constexpr = 0 if REVERSE else WIDTH - 1
    y = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=d_mask, other=0.0)
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - j if REVERSE else j), mask=d_mask, other=0.0)
        y += tap * _sample(
            x_row, init_row, stride_x_l, stride_i_l, t - LEAD + j, d_mask, seqlen, WIDTH, REVERSE, HAS_INIT
        )
    if SILU:
        y = y * tl.sigmoid(y)
    out = out_ptr + batch * stride_o_b + d * stride_o_d + t * stride_o_l
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=d_mask & (t < seqlen))


@triton.jit
def _causal_conv1d_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, bias_ptr, init_ptr, dx_ptr, dweight_ptr, dbias_ptr, dinit_ptr,
    dim, seqlen,
    stride_do_b, stride_do_d, stride_do_l,
    stride_x_b, stride_x_d, stride_x_l,
    stride_i_b, stride_i_d, stride_i_l,
    stride_dx_b, stride_dx_d, stride_dx_l,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INIT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    d = (tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D))[:, None]
    LEAD: tl.constexpr = 0 if REVERSE else WIDTH - 1
    # with initial states, the tokens begin with (in reverse: end with) theirs
    START: tl.constexpr = -LEAD if HAS_INIT else 0
    t = (tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L))[None, :] + START
    d_mask = d < dim
    x_row = x_ptr + batch * stride_x_b + d * stride_x_d
    init_row = init_ptr + batch * stride_i_b + d * stride_i_d
    dout_row = dout_ptr + batch * stride_do_b + d * stride_do_d
    # partial sums over the tokens of a block: (batch, block of tokens, dim, WIDTH) and (batch, block, dim)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    dx = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float32)
    for j in tl.static_range(WIDTH):
        s = t + LEAD - j  # y_s reads x_t with tap j
        inside = (s >= 0) & (s < seqlen)
        dy = tl.load(dout_row + s * stride_do_l, mask=d_mask & inside, other=0.0).to(tl.float32)
        if SILU:
            y = tl.zeros((BLOCK_D, BLOCK_L), dtype=tl.float32)
            if HAS_BIAS:
                y += tl.load(bias_ptr + d, mask=d_mask, other=0.0)
            for i in tl.static_range(WIDTH):
                tap = tl.load(
                    weight_ptr + d * WIDTH + (WIDTH - 1 - i if REVERSE else i), mask=d_mask, other=0.0
                )
                y += tap * _sample(
                    x_row,
                    init_row,
                    stride_x_l,
                    stride_i_l,
                    t - j + i,
                    d_mask,
                    seqlen,
                    WIDTH,
                    REVERSE,
                    HAS_INIT,
                )
            gate = tl.sigmoid(y)
            dy = tl.where(inside, dy * gate * (1 + y * (1 - gate)), 0.0)
        tap = tl.load(weight_ptr + d * WIDTH + (WIDTH - 1 - j if REVERSE else j), mask=d_mask, other=0.0)
        dx += tap * dy
        if j == LEAD:  # s is t
            if HAS_BIAS:
                tl.store(dbias_ptr + part * dim + d, tl.sum(dy, axis=1)[:, None], mask=d_mask)
            for i in tl.static_range(WIDTH):
                x = _sample(
                    x_row,
                    init_row,
                    stride_x_l,
                    stride_i_l,
                    t - j + i,
                    d_mask,
                    seqlen,
                    WIDTH,
                    REVERSE,
                    HAS_INIT,
                )
                place = dweight_ptr + (part * dim + d) * WIDTH + (WIDTH - 1 - i if REVERSE else i)
                tl.store(place, tl.sum(dy * x, axis=1)[:, None], mask=d_mask)
    dx_place = dx_ptr + batch * stride_dx_b + d * stride_dx_d + t * stride_dx_l
    tl.store(dx_place, dx.to(dx_ptr.dtype.element_ty), mask=d_mask & (t >= 0) & (t < seqlen))
    if HAS_INIT:  # contiguous, (batch, dim, WIDTH - 1)
        m = seqlen + WIDTH - 2 - t if REVERSE else t + WIDTH - 1
        place = dinit_ptr + (batch * dim + d) * (WIDTH - 1) + m
        tl.store(place, dx.to(dinit_ptr.dtype.element_ty), mask=d_mask & (m >= 0) & (m < WIDTH - 1))


def _blocks(x: Tensor, channels_last: bool) -> dict[str, int]:
    """Return the block sizes: wide along the axis whose elements lie side by side."""
    if channels_last:
        return {"BLOCK_D": min(64, triton.next_power_of_2(x.shape[1])), "BLOCK_L": 16}
    length = min(256, triton.next_power_of_2(x.shape[2]))
    return {"BLOCK_D": max(1, min(1024 // length, triton.next_power_of_2(x.shape[1]))), "BLOCK_L": length}


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, dict[str, Any]]:
    x = x.transpose(1, 2) if channels_last else x
    options = {
        "WIDTH": weight.shape[1],
        "SILU": silu,
        "REVERSE": reverse,
        "HAS_BIAS": bias is not None,
        "HAS_INIT": initial is not None,
        **_blocks(x, channels_last),
    }
    bias = None if bias is None else bias.float().contiguous()
    initial = None if initial is None else initial.to(x.dtype)
    return x, weight.float().contiguous(), bias, initial, options


def _grid(batch: int, dim: int, tokens: int, options: dict[str, Any]) -> tuple[int, int, int]:
    return (triton.cdiv(tokens, options["BLOCK_L"]), triton.cdiv(dim, options["BLOCK_D"]), batch)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out, final_states), out in the order of axes of x."""
    shape = x.shape
    x, weight, bias, initial, options = _prepare(
        x, weight, bias, initial_states, silu, reverse, channels_last
    )
    batch, dim, seqlen = x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    o = out.transpose(1, 2) if channels_last else out
    strides = (0, 0, 0) if initial is None else initial.stride()
    _causal_conv1d_fwd_kernel[_grid(batch, dim, seqlen, options)](
        x, weight, bias, initial if initial is not None else x, o, dim, seqlen,
        *x.stride(), *strides, *o.stride(), **options,
    )  # fmt: skip
    return out, final_states_of(x, initial, options["WIDTH"] - 1, reverse)


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and initial_states; None for absent inputs."""
    x, taps, bias, initial, options = _prepare(x, weight, bias, initial_states, silu, reverse, channels_last)
    batch, dim, seqlen = x.shape
    width = options["WIDTH"]
    grid = _grid(batch, dim, seqlen + (width - 1 if initial is not None else 0), options)
    wide = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(dout.shape, dtype=x.dtype, device=x.device)
    do, dx_as_x = (g.transpose(1, 2) if channels_last else g for g in (dout, dx))
    dweight = torch.empty((batch * grid[0], dim, width), **wide)
    dbias = None if bias is None else torch.empty((batch * grid[0], dim), **wide)
    dinitial = None if initial is None else torch.empty(initial.shape, dtype=x.dtype, device=x.device)
    strides = (0, 0, 0) if initial is None else initial.stride()
    _causal_conv1d_bwd_kernel[grid](
        do, x, taps, bias, initial if initial is not None else x, dx_as_x, dweight, dbias, dinitial, dim, seqlen,
        *do.stride(), *x.stride(), *strides, *dx_as_x.stride(), **options,
    )  # fmt: skip
    if dfinal is not None:
        add_final_gradient(dfinal, dx_as_x, dinitial, reverse)
    return dx, dweight.sum(0), None if dbias is None else dbias.sum(0), dinitial


def _ahead(kernel: Any, pointers: tuple[str, ...], strides: int, kind: str, options: dict[str, Any]) -> Any:
    """Return one entry of AHEAD; tensors in the compute dtype are named with a leading underscore."""
    names = [p.removeprefix("_") for p in pointers]
    signature = {
        f"{name}_ptr": "*fp32" if p.startswith("_") else f"*{kind}"
        for name, p in zip(names, pointers, strict=True)
    }
    signature |= dict.fromkeys(kernel.arg_names[len(pointers) : len(pointers) + 2 + strides], "i32")
    signature |= dict.fromkeys(options, "constexpr")
    return kernel, signature, options, 4


_FWD = ("x", "_weight", "_bias", "init", "out")
_BWD = ("dout", "x", "_weight", "_bias", "init", "dx", "_dweight", "_dbias", "dinit")
AHEAD = tuple(
    _ahead(
        kernel,
        pointers,
        strides,
        kind,
        {"WIDTH": 4, "SILU": True, "REVERSE": reverse, "HAS_BIAS": True, "HAS_INIT": reverse, **blocks},
    )
    for kernel, pointers, strides in (
        (_causal_conv1d_fwd_kernel, _FWD, 9),
        (_causal_conv1d_bwd_kernel, _BWD, 12),
    )
    for kind in ("fp32", "bf16")
    for reverse, blocks in (
        (False, {"BLOCK_D": 4, "BLOCK_L": 256}),
        (True, {"BLOCK_D": 64, "BLOCK_L": 16}),
    )
)
