"""Triton kernels of attention: the backward pass. See triton_impl.py."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.kernels.common.attention.triton_forward import _dot, _load, _rows, _scores, _store, _tokens


@triton.jit
def _score_gradients(
    q,
    k,
    v,
    dout,
    qi,
    ki,
    q_region,
    k_region,
    bias_ptr,
    dfirst_ptr,
    lse_ptr,
    delta_ptr,
    b,
    item,
    head,
    heads,
    queries,
    keys,
    scale,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the weights and the gradients of the scores of a block, (queries, keys).

    The gradients cancel over the keys and know no bound, so products with them are not made in half precision.
    """
    s = _scores(
        q, k, qi, ki, q_region, k_region, bias_ptr, head, queries, keys, scale, HAS_BIAS, MASKED, PRECISION
    )
    place = (item.to(tl.int64) * heads + head) * queries + qi
    lse = tl.load(lse_ptr + place, mask=qi < queries, other=0.0)
    delta = tl.load(delta_ptr + place, mask=qi < queries, other=0.0)
    p = tl.where((qi < queries)[:, None], tl.exp2(s - lse[:, None]), 0.0)
    dp = _dot(dout, tl.trans(v), PRECISION)
    if HAS_FIRST:
        dfirst = tl.load(dfirst_ptr + b.to(tl.int64) * keys + ki, mask=ki < keys, other=0.0)
        dp += tl.where((qi == 0)[:, None], dfirst[None, :], 0.0)
    return p, p * (dp - delta[:, None])


@triton.jit
def _attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, bias_ptr, dout_ptr, dfirst_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_q_b, stride_q_h, stride_q_y, stride_q_x, stride_k_b, stride_k_h, stride_k_y, stride_k_x,
    stride_v_b, stride_v_h, stride_v_y, stride_v_x, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x,
    stride_dq_b, stride_dq_h, stride_dq_y, stride_dq_x,
    scale, heads, queries, keys, windows, height, width, win_h, win_w, shift_h, shift_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, ROLL_FIRST: tl.constexpr, MASKED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(1), tl.program_id(2)
    b, window = item // windows, item % windows
    qi = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    qy, qx, q_in, q_region = _tokens(
        qi, queries, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
    )
    q = _load(
        _rows(q_ptr, b, head, qy, qx, stride_q_b, stride_q_h, stride_q_y, stride_q_x),
        q_in,
        q_ptr,
        head,
        HEAD_DIM,
        BLOCK_D,
        False,
    )
    dout = _load(
        _rows(dout_ptr, b, head, qy, qx, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x),
        q_in,
        q_ptr,
        head,
        HEAD_DIM,
        BLOCK_D,
        False,
    )
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k0 in range(0, keys, BLOCK_K):
        ki = k0 + tl.arange(0, BLOCK_K)
        ky, kx, k_in, k_region = _tokens(
            ki, keys, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
        )
        k = _load(
            _rows(k_ptr, b, head, ky, kx, stride_k_b, stride_k_h, stride_k_y, stride_k_x),
            k_in,
            pad_k_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            HAS_PAD,
        )
        v = _load(
            _rows(v_ptr, b, head, ky, kx, stride_v_b, stride_v_h, stride_v_y, stride_v_x),
            k_in,
            pad_v_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            HAS_PAD,
        )
        _p, ds = _score_gradients(
            q,
            k,
            v,
            dout,
            qi,
            ki,
            q_region,
            k_region,
            bias_ptr,
            dfirst_ptr,
            lse_ptr,
            delta_ptr,
            b,
            item,
            head,
            heads,
            queries,
            keys,
            scale,
            HAS_BIAS,
            MASKED,
            HAS_FIRST,
            PRECISION,
        )
        dq += _dot(ds, k.to(tl.float32), PRECISION)
    rows = _rows(dq_ptr, b, head, qy, qx, stride_dq_b, stride_dq_h, stride_dq_y, stride_dq_x)
    _store(rows, q_in, (dq * scale).to(q.dtype), HEAD_DIM, BLOCK_D)


@triton.jit
def _attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, bias_ptr, dout_ptr, dfirst_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpad_ptr,
    stride_q_b, stride_q_h, stride_q_y, stride_q_x, stride_k_b, stride_k_h, stride_k_y, stride_k_x,
    stride_v_b, stride_v_h, stride_v_y, stride_v_x, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x,
    stride_dk_b, stride_dk_h, stride_dk_y, stride_dk_x, stride_dv_b, stride_dv_h, stride_dv_y, stride_dv_x,
    scale, heads, queries, keys, windows, height, width, win_h, win_w, shift_h, shift_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, ROLL_FIRST: tl.constexpr, MASKED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(1), tl.program_id(2)
    b, window = item // windows, item % windows
    ki = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ky, kx, k_in, k_region = _tokens(
        ki, keys, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
    )
    k = _load(
        _rows(k_ptr, b, head, ky, kx, stride_k_b, stride_k_h, stride_k_y, stride_k_x),
        k_in,
        pad_k_ptr,
        head,
        HEAD_DIM,
        BLOCK_D,
        HAS_PAD,
    )
    v = _load(
        _rows(v_ptr, b, head, ky, kx, stride_v_b, stride_v_h, stride_v_y, stride_v_x),
        k_in,
        pad_v_ptr,
        head,
        HEAD_DIM,
        BLOCK_D,
        HAS_PAD,
    )
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for q0 in range(0, queries, BLOCK_Q):
        qi = q0 + tl.arange(0, BLOCK_Q)
        qy, qx, q_in, q_region = _tokens(
            qi, queries, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
        )
        q = _load(
            _rows(q_ptr, b, head, qy, qx, stride_q_b, stride_q_h, stride_q_y, stride_q_x),
            q_in,
            q_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            False,
        )
        dout = _load(
            _rows(dout_ptr, b, head, qy, qx, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x),
            q_in,
            q_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            False,
        )
        p, ds = _score_gradients(
            q,
            k,
            v,
            dout,
            qi,
            ki,
            q_region,
            k_region,
            bias_ptr,
            dfirst_ptr,
            lse_ptr,
            delta_ptr,
            b,
            item,
            head,
            heads,
            queries,
            keys,
            scale,
            HAS_BIAS,
            MASKED,
            HAS_FIRST,
            PRECISION,
        )
        dv += _dot(tl.trans(p.to(dout.dtype)), dout, PRECISION)
        dk += _dot(tl.trans(ds), q.to(tl.float32), PRECISION)
    dk *= scale
    _store(
        _rows(dk_ptr, b, head, ky, kx, stride_dk_b, stride_dk_h, stride_dk_y, stride_dk_x),
        k_in,
        dk.to(k.dtype),
        HEAD_DIM,
        BLOCK_D,
    )
    _store(
        _rows(dv_ptr, b, head, ky, kx, stride_dv_b, stride_dv_h, stride_dv_y, stride_dv_x),
        k_in,
        dv.to(k.dtype),
        HEAD_DIM,
        BLOCK_D,
    )
    if HAS_PAD:
        padding = ((ki < keys) & (k_in == 0))[:, None]
        d = tl.arange(0, BLOCK_D)
        part = item.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        place = (
            dpad_ptr + (part * 2 * heads + head) * HEAD_DIM + d
        )  # (items, blocks, k or v, heads, HEAD_DIM)
        tl.store(place, tl.sum(tl.where(padding, dk, 0.0), axis=0), mask=d < HEAD_DIM)
        tl.store(place + heads * HEAD_DIM, tl.sum(tl.where(padding, dv, 0.0), axis=0), mask=d < HEAD_DIM)


@triton.jit
def _attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, bias_ptr, dout_ptr, dfirst_ptr, lse_ptr, delta_ptr, dbias_ptr,
    stride_q_b, stride_q_h, stride_q_y, stride_q_x, stride_k_b, stride_k_h, stride_k_y, stride_k_x,
    stride_v_b, stride_v_h, stride_v_y, stride_v_x, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x,
    scale, heads, queries, keys, windows, height, width, win_h, win_w, shift_h, shift_w, items, per_part,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, ROLL_FIRST: tl.constexpr, MASKED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the scores of one block over a part of all windows; dbias is (parts, heads, M, M)."""
    part, head = tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(keys, BLOCK_K)
    qi = tl.program_id(0) // across * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ki = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for step in range(0, tl.minimum(per_part, items - part * per_part)):
        item = part * per_part + step
        b, window = item // windows, item % windows
        qy, qx, q_in, q_region = _tokens(
            qi, queries, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
        )
        ky, kx, k_in, k_region = _tokens(
            ki, keys, window, height, width, win_h, win_w, shift_h, shift_w, WINDOWED, ROLL_FIRST
        )
        q = _load(
            _rows(q_ptr, b, head, qy, qx, stride_q_b, stride_q_h, stride_q_y, stride_q_x),
            q_in,
            q_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            False,
        )
        dout = _load(
            _rows(dout_ptr, b, head, qy, qx, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x),
            q_in,
            q_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            False,
        )
        k = _load(
            _rows(k_ptr, b, head, ky, kx, stride_k_b, stride_k_h, stride_k_y, stride_k_x),
            k_in,
            pad_k_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            HAS_PAD,
        )
        v = _load(
            _rows(v_ptr, b, head, ky, kx, stride_v_b, stride_v_h, stride_v_y, stride_v_x),
            k_in,
            pad_v_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            HAS_PAD,
        )
        _p, ds = _score_gradients(
            q,
            k,
            v,
            dout,
            qi,
            ki,
            q_region,
            k_region,
            bias_ptr,
            dfirst_ptr,
            lse_ptr,
            delta_ptr,
            b,
            item,
            head,
            heads,
            queries,
            keys,
            scale,
            HAS_BIAS,
            MASKED,
            HAS_FIRST,
            PRECISION,
        )
        total += ds
    place = ((part.to(tl.int64) * heads + head) * queries + qi)[:, None] * keys + ki[None, :]
    tl.store(dbias_ptr + place, total, mask=(qi < queries)[:, None] & (ki < keys)[None, :])
