"""Linear attention with one decay a head and token in Triton: chunks side by side, the state passed between them.

Four kernels: what each chunk adds to the state, the states passed along the sequence, the output, the gradients. The
decay from token j to token i of a chunk is 2^(x_i - x_j), with x the running sum of the log2 decays since the chunk's
start, as a pair of float32: the difference of two long sums must keep its last bits.

Legend: B batch, L tokens, K size of q and k, V size of v, C tokens of a chunk, S state before a chunk, R gradient of
the state after it, M_ij = 2^(x_i - x_j) for j <= i, s step, grow_i = 2^x_i, fall_j = 2^(x_end - x_j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from vitzoo.kernels.common.linear_scan_cpu import Call, Gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIZE = 128  # of K and V: a state is held by one program


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # of the exponent whose power cannot overflow
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _linear_scan_add_kernel(
    rows_ptr, columns_ptr, weight_ptr, out_ptr,
    stride_r_b, stride_r_l, stride_r_g, stride_r_k,
    stride_c_b, stride_c_l, stride_c_h, stride_c_v,
    seqlen, heads, per_group, chunks, dk, dv,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write rows^T (weight columns) of a chunk, (K, V)."""
    chunk, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = image // heads, image % heads
    offs_c, offs_k, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    token = chunk * BLOCK_C + offs_c
    inside = token < seqlen
    rows_ptr += batch * stride_r_b + head // per_group * stride_r_g
    columns_ptr += batch * stride_c_b + head * stride_c_h
    rows = tl.load(
        rows_ptr + offs_k[:, None] * stride_r_k + token[None, :] * stride_r_l,
        mask=(offs_k < dk)[:, None] & inside[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    columns = tl.load(
        columns_ptr + token[:, None] * stride_c_l + offs_v[None, :] * stride_c_v,
        mask=inside[:, None] & (offs_v < dv)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    weight = tl.load(weight_ptr + (batch * chunks * BLOCK_C + token) * heads + head)
    total = tl.dot(rows, columns * weight[:, None], input_precision=PRECISION)
    out_ptr += (image * chunks + chunk) * dk * dv
    tl.store(
        out_ptr + offs_k[:, None] * dv + offs_v[None, :], total,
        mask=(offs_k < dk)[:, None] & (offs_v < dv)[None, :],
    )  # fmt: skip


@triton.jit
def _linear_scan_pass_kernel(
    matrices_ptr, decay_ptr, initial_ptr, final_ptr, heads, chunks, size,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds, in place, into the state before it (after it where REVERSE)."""
    image = tl.program_id(1).to(tl.int64)
    batch, head = image // heads, image % heads
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    state = tl.load(initial_ptr + image * size + offs, mask=mask, other=0.0)
    for n in range(0, chunks):
        chunk = chunks - 1 - n if REVERSE else n
        decay = tl.load(decay_ptr + (batch * chunks + chunk) * heads + head)
        matrix_ptr = matrices_ptr + (image * chunks + chunk) * size + offs
        added = tl.load(matrix_ptr, mask=mask, other=0.0)
        tl.store(matrix_ptr, state, mask=mask)
        state = decay * state + added
    tl.store(final_ptr + image * size + offs, state, mask=mask)


@triton.jit
def _linear_scan_fwd_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, skip_ptr, step_ptr, high_ptr, low_ptr, grow_ptr, states_ptr, out_ptr,
    stride_q_b, stride_q_l, stride_q_g, stride_q_k,
    stride_k_b, stride_k_l, stride_k_g, stride_k_k,
    stride_v_b, stride_v_l, stride_v_h, stride_v_v,
    stride_z_b, stride_z_l, stride_z_h, stride_z_v,
    scale, seqlen, heads, per_group, chunks, dk, dv,
    HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out = (grow (q S) + (M * q k^T) (s v) + D v) silu(z) of a chunk."""
    chunk, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = image // heads, image % heads
    group = head // per_group
    offs_c, offs_k, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    token = chunk * BLOCK_C + offs_c
    inside = token < seqlen
    mask_k, mask_v = inside[:, None] & (offs_k < dk)[None, :], inside[:, None] & (offs_v < dv)[None, :]
    time = (batch * chunks * BLOCK_C + token) * heads + head
    step, grow = tl.load(step_ptr + time), tl.load(grow_ptr + time)
    high, low = tl.load(high_ptr + time), tl.load(low_ptr + time)
    q_ptr += batch * stride_q_b + group * stride_q_g
    k_ptr += batch * stride_k_b + group * stride_k_g
    v_ptr += batch * stride_v_b + head * stride_v_h
    q = tl.load(q_ptr + token[:, None] * stride_q_l + offs_k[None, :] * stride_q_k, mask=mask_k, other=0.0)
    k = tl.load(k_ptr + token[:, None] * stride_k_l + offs_k[None, :] * stride_k_k, mask=mask_k, other=0.0)
    v = tl.load(v_ptr + token[:, None] * stride_v_l + offs_v[None, :] * stride_v_v, mask=mask_v, other=0.0)
    q, k, v = q.to(tl.float32) * scale, k.to(tl.float32), v.to(tl.float32)
    below = offs_c[:, None] >= offs_c[None, :]
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    pairs = tl.where(below, tl.exp2(tl.where(below, exponent, 0.0)) * pairs, 0.0)
    state = tl.load(
        states_ptr + (image * chunks + chunk) * dk * dv + offs_k[:, None] * dv + offs_v[None, :],
        mask=(offs_k < dk)[:, None] & (offs_v < dv)[None, :], other=0.0,
    )  # fmt: skip
    y = tl.dot(q, state, input_precision=PRECISION) * grow[:, None]
    y += tl.dot(pairs, v * step[:, None], input_precision=PRECISION)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + head * dv + offs_v, mask=offs_v < dv, other=0.0)
        y += skip[None, :] * v
    if HAS_Z:
        z_ptr += batch * stride_z_b + head * stride_z_h
        z = tl.load(
            z_ptr + token[:, None] * stride_z_l + offs_v[None, :] * stride_z_v, mask=mask_v, other=0.0
        )
        z = z.to(tl.float32)
        y = y * z * _sigmoid(z)
    out_ptr += ((batch * seqlen + token[:, None]) * heads + head) * dv + offs_v[None, :]
    tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _linear_scan_bwd_kernel(
    q_ptr, k_ptr, v_ptr, z_ptr, dout_ptr, skip_ptr, step_ptr, high_ptr, low_ptr, grow_ptr, fall_ptr, end_ptr,
    states_ptr, gradients_ptr, dq_ptr, dk_ptr, dv_ptr, dz_ptr, dstep_ptr, dlog_ptr, dskip_ptr,
    stride_q_b, stride_q_l, stride_q_g, stride_q_k,
    stride_k_b, stride_k_l, stride_k_g, stride_k_k,
    stride_v_b, stride_v_l, stride_v_h, stride_v_v,
    stride_z_b, stride_z_l, stride_z_h, stride_z_v,
    stride_o_b, stride_o_l, stride_o_h, stride_o_v,
    scale, seqlen, heads, per_group, chunks, dk, dv,
    HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write every gradient of a chunk; dq and dk of each head, dlog that of the log decays, dstep the step's own."""
    chunk, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = image // heads, image % heads
    group = head // per_group
    offs_c, offs_k, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    token = chunk * BLOCK_C + offs_c
    inside = token < seqlen
    mask_k, mask_v = inside[:, None] & (offs_k < dk)[None, :], inside[:, None] & (offs_v < dv)[None, :]
    time = (batch * chunks * BLOCK_C + token) * heads + head
    step, grow, fall = tl.load(step_ptr + time), tl.load(grow_ptr + time), tl.load(fall_ptr + time)
    high, low = tl.load(high_ptr + time), tl.load(low_ptr + time)
    q_ptr += batch * stride_q_b + group * stride_q_g
    k_ptr += batch * stride_k_b + group * stride_k_g
    v_ptr += batch * stride_v_b + head * stride_v_h
    dout_ptr += batch * stride_o_b + head * stride_o_h
    q = tl.load(q_ptr + token[:, None] * stride_q_l + offs_k[None, :] * stride_q_k, mask=mask_k, other=0.0)
    k = tl.load(k_ptr + token[:, None] * stride_k_l + offs_k[None, :] * stride_k_k, mask=mask_k, other=0.0)
    v = tl.load(v_ptr + token[:, None] * stride_v_l + offs_v[None, :] * stride_v_v, mask=mask_v, other=0.0)
    dy = tl.load(
        dout_ptr + token[:, None] * stride_o_l + offs_v[None, :] * stride_o_v, mask=mask_v, other=0.0
    )
    q, k, v, dy = q.to(tl.float32) * scale, k.to(tl.float32), v.to(tl.float32), dy.to(tl.float32)
    matrix = (image * chunks + chunk) * dk * dv + offs_k[:, None] * dv + offs_v[None, :]
    mask_s = (offs_k < dk)[:, None] & (offs_v < dv)[None, :]
    state = tl.load(states_ptr + matrix, mask=mask_s, other=0.0)
    gradient = tl.load(gradients_ptr + matrix, mask=mask_s, other=0.0)
    driven = v * step[:, None]
    below, strictly = offs_c[:, None] >= offs_c[None, :], offs_c[:, None] > offs_c[None, :]
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.where(below, tl.exp2(tl.where(below, exponent, 0.0)), 0.0)
    pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
    row = ((batch * seqlen + token[:, None]) * heads + head) * dv + offs_v[None, :]
    skip = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_SKIP:
        skip = tl.load(skip_ptr + head * dv + offs_v, mask=offs_v < dv, other=0.0)
    if HAS_Z:
        y = tl.dot(q, state, input_precision=PRECISION) * grow[:, None]
        y += tl.dot(pairs, driven, input_precision=PRECISION) + skip[None, :] * v
        z_ptr += batch * stride_z_b + head * stride_z_h
        z = tl.load(
            z_ptr + token[:, None] * stride_z_l + offs_v[None, :] * stride_z_v, mask=mask_v, other=0.0
        )
        z = z.to(tl.float32)
        gate = _sigmoid(z)
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + row, dz.to(dz_ptr.dtype.element_ty), mask=mask_v)
        dy = dy * z * gate
    if HAS_SKIP:
        dskip = ((batch * chunks + chunk) * heads + head) * dv + offs_v
        tl.store(dskip_ptr + dskip, tl.sum(dy * v, axis=0), mask=offs_v < dv)
    dpairs = tl.dot(dy, tl.trans(driven), input_precision=PRECISION)
    change = tl.where(strictly, pairs * dpairs, 0.0)
    dpairs = dpairs * decay
    # the sum over the pairs j < t <= i, whose decay holds that of token t
    dlog = tl.sum(tl.where(strictly, tl.cumsum(change, axis=0, reverse=True), 0.0), axis=1)

    carried = tl.dot(k, gradient, input_precision=PRECISION) * fall[:, None]
    to_state = tl.sum(carried * driven, axis=1)
    ddriven = carried + tl.dot(tl.trans(pairs), dy, input_precision=PRECISION)
    tl.store(
        dv_ptr + row, (ddriven * step[:, None] + skip[None, :] * dy).to(dv_ptr.dtype.element_ty), mask=mask_v
    )
    dstep = tl.sum(ddriven * v, axis=1)

    dq = tl.dot(dy, tl.trans(state), input_precision=PRECISION) * grow[:, None]
    from_state = tl.sum(dq * q, axis=1)
    dq += tl.dot(dpairs, k, input_precision=PRECISION)
    side = ((batch * seqlen + token[:, None]) * heads + head) * dk + offs_k[None, :]
    tl.store(dq_ptr + side, dq * scale, mask=mask_k)
    dkey = tl.dot(driven, tl.trans(gradient), input_precision=PRECISION) * fall[:, None]
    dkey += tl.dot(tl.trans(dpairs), q, input_precision=PRECISION)
    tl.store(dk_ptr + side, dkey, mask=mask_k)

    end = tl.load(end_ptr + (batch * chunks + chunk) * heads + head)
    dlog += end * tl.sum(tl.sum(state * gradient, axis=1), axis=0)
    dlog += tl.sum(tl.where(offs_c[:, None] <= offs_c[None, :], from_state[None, :], 0.0), axis=1)
    dlog += tl.sum(tl.where(strictly, to_state[None, :], 0.0), axis=1)
    flat = (batch * seqlen + token) * heads + head
    tl.store(dstep_ptr + flat, dstep, mask=inside)
    tl.store(dlog_ptr + flat, dlog, mask=inside)


@dataclass(frozen=True)
class _Times:
    """Steps and decays, (B, chunks * C, heads) in float32, tokens beyond L with step 0 and no decay of their own."""

    raw: Tensor  # before softplus, (B, L, heads)
    step: Tensor
    high: Tensor
    low: Tensor
    grow: Tensor
    fall: Tensor
    end: Tensor  # decay of a chunk, (B, chunks, heads)


def why_not(x: Tensor, name: str, dk: int, dv: int) -> str | None:
    """Return why the Triton kernels cannot take a call whose first input is x, `name`, or None; device apart."""
    if x.dtype not in DTYPES:
        return f"{name} is {x.dtype}, not float32, bfloat16 or float16"
    if max(dk, dv) > MAX_SIZE:
        return f"a state of {dk} x {dv} exceeds {MAX_SIZE} x {MAX_SIZE}"
    return None


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _sizes(dk: int, dv: int, half: bool, backward: bool) -> dict[str, int]:
    """Return the blocks: chunks of 64 tokens where their tiles fit the registers, of 32 elsewhere."""
    return {
        "BLOCK_C": 64 if half and not backward and max(dk, dv) <= 64 else 32,
        "BLOCK_K": _block(dk),
        "BLOCK_V": _block(dv),
    }


def _precision(v: Tensor) -> str:
    # half-precision inputs have at most the digits of tf32, and tf32 has the range of float32
    return "ieee" if v.dtype == torch.float32 else "tf32"


def _times(call: Call, block: int) -> _Times:
    batch, seqlen, heads, _ = call.v.shape
    if call.dt is None:
        raw = call.v.new_ones((batch, seqlen, heads), dtype=torch.float32)
    else:
        raw = call.dt.float() if call.dt_bias is None else call.dt.float() + call.dt_bias.float()
    step = F.pad(F.softplus(raw) if call.dt_softplus else raw, (0, 0, 0, -seqlen % block))
    rate = call.rate.double() / math.log(2)
    x = (step.double() * rate).unflatten(1, (-1, block)).cumsum(2)
    end = x[:, :, -1]
    high = x.float()
    parts = (high, (x - high).float(), x.exp2().float(), (end.unsqueeze(2) - x).exp2().float())
    return _Times(
        raw,
        step.contiguous(),
        *(p.flatten(1, 2).contiguous() for p in parts),
        end.exp2().float().contiguous(),
    )


def _add(call: Call, rows: Tensor, columns: Tensor, weight: Tensor, blocks: dict[str, int]) -> Tensor:
    batch, seqlen, heads, dv = columns.shape
    dk, chunks = rows.shape[3], -(-seqlen // blocks["BLOCK_C"])
    out = columns.new_empty((batch * heads, chunks, dk, dv), dtype=torch.float32)
    sizes = (seqlen, heads, heads // rows.shape[2], chunks, dk, dv)
    _linear_scan_add_kernel[(chunks, batch * heads)](
        rows, columns, weight, out, *rows.stride(), *columns.stride(), *sizes, **blocks, PRECISION=_precision(call.v)
    )  # fmt: skip
    return out


def _pass(matrices: Tensor, decay: Tensor, initial: Tensor | None, heads: int, reverse: bool) -> Tensor:
    images, chunks, dk, dv = matrices.shape
    shape = (images // heads, heads, dk, dv)
    start = matrices.new_zeros(shape) if initial is None else initial.float().contiguous()
    final = matrices.new_empty(shape)
    block = min(1024, triton.next_power_of_2(dk * dv))
    _linear_scan_pass_kernel[(triton.cdiv(dk * dv, block), images)](
        matrices, decay, start, final, heads, chunks, dk * dv, REVERSE=reverse, BLOCK=block
    )
    return final


def _skip(call: Call) -> Tensor | None:
    """Return D as (heads, V), float32."""
    if call.D is None:
        return None
    full = call.D if call.D.ndim == 2 else call.D.unsqueeze(1)
    return full.float().expand(-1, call.v.shape[3]).contiguous()


def _warps(blocks: dict[str, int]) -> int:
    return 4 if blocks["BLOCK_K"] * blocks["BLOCK_V"] <= 1024 else 8


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return out, (B, L, heads, V), and the last state, (B, heads, K, V)."""
    q, k, v, z = call.q, call.k, call.v, call.z if call.z is not None else call.v
    batch, seqlen, heads, dv = v.shape
    dk, blocks = q.shape[3], _sizes(q.shape[3], dv, v.dtype != torch.float32, backward=False)
    w, skip = _times(call, blocks["BLOCK_C"]), _skip(call)
    states = _add(call, k, v, w.fall * w.step, blocks)
    final = _pass(states, w.end, call.initial_state, heads, reverse=False)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    chunks = states.shape[1]
    _linear_scan_fwd_kernel[(chunks, batch * heads)](
        q, k, v, z, v if skip is None else skip, w.step, w.high, w.low, w.grow, states, out,
        *q.stride(), *k.stride(), *v.stride(), *z.stride(),
        call.scale, seqlen, heads, heads // q.shape[2], chunks, dk, dv,
        HAS_Z=call.z is not None, HAS_SKIP=skip is not None, **blocks, PRECISION=_precision(v),
        num_warps=_warps(blocks),
    )  # fmt: skip
    return out, final


def _gated(call: Call, dout: Tensor) -> Tensor:
    return dout if call.z is None else dout.float() * F.silu(call.z.float())


def backward(call: Call, dout: Tensor, dstate: Tensor | None) -> Gradients:
    """Return the gradients, given those of out and of the last state."""
    q, k, v, z = call.q, call.k, call.v, call.z if call.z is not None else call.v
    batch, seqlen, heads, dv_size = v.shape
    groups, dk_size = q.shape[2], q.shape[3]
    blocks = _sizes(dk_size, dv_size, v.dtype != torch.float32, backward=True)
    w, skip = _times(call, blocks["BLOCK_C"]), _skip(call)
    states = _add(call, k, v, w.fall * w.step, blocks)
    _pass(states, w.end, call.initial_state, heads, reverse=False)
    gradients = _add(call, q, _gated(call, dout), w.grow * call.scale, blocks)
    dinitial = _pass(gradients, w.end, dstate, heads, reverse=True)
    chunks = states.shape[1]

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device=v.device)

    dq, dk = (empty(batch, seqlen, heads, dk_size) for _ in range(2))
    dv, dz = empty(*v.shape, of=v.dtype), empty(*v.shape, of=z.dtype) if call.z is not None else v
    dstep, dlog = (empty(batch, seqlen, heads) for _ in range(2))
    dskip = dstep if skip is None else empty(batch, chunks, heads, dv_size)
    _linear_scan_bwd_kernel[(chunks, batch * heads)](
        q, k, v, z, dout, v if skip is None else skip, w.step, w.high, w.low, w.grow, w.fall, w.end,
        states, gradients, dq, dk, dv, dz, dstep, dlog, dskip,
        *q.stride(), *k.stride(), *v.stride(), *z.stride(), *dout.stride(),
        call.scale, seqlen, heads, heads // groups, chunks, dk_size, dv_size,
        HAS_Z=call.z is not None, HAS_SKIP=skip is not None, **blocks, PRECISION=_precision(v),
        num_warps=_warps(blocks),
    )  # fmt: skip
    ddt = None
    if call.dt is not None:
        ddt = dstep + dlog * call.rate.float()
        if call.dt_softplus:
            ddt = ddt * torch.where(w.raw > 20, 1.0, torch.sigmoid(w.raw))
    dD = None
    if call.D is not None:
        dD = dskip.sum((0, 1) if call.D.ndim == 2 else (0, 1, 3))
    return Gradients(
        q=dq.unflatten(2, (groups, -1)).sum(3),
        k=dk.unflatten(2, (groups, -1)).sum(3),
        v=dv,
        rate=(dlog * w.step[:, :seqlen]).sum((0, 1)),
        dt=ddt,
        D=dD,
        z=dz if call.z is not None else None,
        initial_state=dinitial,
    )


def _ahead(kernel: Any, dtype: str, constexprs: dict[str, Any], num_warps: int) -> tuple[Any, ...]:
    """Return one entry of AHEAD: the inputs in `dtype`, all else float32 and 32-bit sizes."""
    typed = {f"{n}_ptr" for n in ("q", "k", "v", "z", "dout", "out", "dv", "dz", "rows", "columns")}
    if kernel is _linear_scan_add_kernel:
        typed.discard("out_ptr")
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype if name in typed else 'fp32'}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return kernel, signature, constexprs, num_warps


def ahead(has_z: bool, has_skip: bool) -> tuple[Any, ...]:
    """Return what `triton_support.compile_ahead` compiles, each kernel in float32 and bfloat16."""
    flags = {"HAS_Z": has_z, "HAS_SKIP": has_skip}
    entries = [
        _ahead(_linear_scan_pass_kernel, "fp32", {"REVERSE": reverse, "BLOCK": 1024}, 4)
        for reverse in (False, True)
    ]
    for dtype, precision in (("fp32", "ieee"), ("bf16", "tf32")):
        for kernel in (_linear_scan_add_kernel, _linear_scan_fwd_kernel, _linear_scan_bwd_kernel):
            sizes = _sizes(64, 64, dtype == "bf16", kernel is _linear_scan_bwd_kernel)
            own = {} if kernel is _linear_scan_add_kernel else flags
            warps = 4 if kernel is _linear_scan_add_kernel else 8
            entries.append(_ahead(kernel, dtype, {**own, **sizes, "PRECISION": precision}, warps))
    return tuple(entries)
