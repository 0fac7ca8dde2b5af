"""Triton kernels of attention: finding tokens, scores, the forward pass. See triton_impl.py."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tokens(
    i,
    count,
    window,
    height,
    width,
    win_h,
    win_w,
    shift_h,
    shift_w,
    WINDOWED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):
    """Return row and column in the map of tokens i, whether they lie inside it, and their regions."""
    if WINDOWED:
        across = (width + win_w - 1) // win_w
        full_h = (height + win_h - 1) // win_h * win_h
        full_w = across * win_w
        y = window // across * win_h + i // win_w
        x = window % across * win_w + i % win_w
        region = 3 * _region(y, full_h, win_h, shift_h) + _region(x, full_w, win_w, shift_w)
        if ROLL_FIRST:
            y_from = tl.where(y < height, (y + shift_h) % height, height)
            x_from = tl.where(x < width, (x + shift_w) % width, width)
        else:
            y_from = tl.where(y + shift_h < full_h, y + shift_h, y + shift_h - full_h)
            x_from = tl.where(x + shift_w < full_w, x + shift_w, x + shift_w - full_w)
        inside = (i < count) & (y_from < height) & (x_from < width)
        return y_from, x_from, inside, region
    else:
        return i * 0, i, i < count, i * 0


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    # Triton's interpreter multiplies the bits of bfloat16: there, and only there, products are of widened operands
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _region(i, padded, window, shift):
    later = (i >= padded - window).to(tl.int32) + (i >= padded - shift).to(tl.int32)
    return tl.where(shift > 0, later, 0)


@triton.jit
def _rows(ptr, b, head, y, x, stride_b, stride_h, stride_y, stride_x):
    start = ptr + b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return start + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def _load(rows, inside, pad_ptr, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PAD: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HAS_PAD:
        pad = tl.load(pad_ptr + head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        tile = tl.where(inside[:, None], tile, pad[None, :].to(tile.dtype))
    return tile


@triton.jit
def _store(rows, inside, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(rows[:, None] + d[None, :], tile, mask=inside[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _scores(
    q,
    k,
    qi,
    ki,
    q_region,
    k_region,
    bias_ptr,
    head,
    queries,
    keys,
    scale,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return scores in units of log 2, (queries, keys), -inf past the last key and for excluded ones."""
    s = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2E)
    within = (qi < queries)[:, None] & (ki < keys)[None, :]
    if HAS_BIAS:
        place = (head.to(tl.int64) * queries + qi.to(tl.int64))[:, None] * keys + ki[None, :]
        s += tl.load(bias_ptr + place, mask=within, other=0.0).to(tl.float32) * LOG2E
    s = tl.where((ki < keys)[None, :], s, float("-inf"))
    if MASKED:
        s = tl.where(q_region[:, None] == k_region[None, :], s, float("-inf"))
    return s


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_k_ptr, pad_v_ptr, bias_ptr, dout_ptr, dfirst_ptr, out_ptr, first_ptr, lse_ptr, delta_ptr,
    stride_q_b, stride_q_h, stride_q_y, stride_q_x, stride_k_b, stride_k_h, stride_k_y, stride_k_x,
    stride_v_b, stride_v_h, stride_v_y, stride_v_x, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x,
    stride_out_b, stride_out_h, stride_out_y, stride_out_x,
    scale, heads, queries, keys, windows, height, width, win_h, win_w, shift_h, shift_w,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, ROLL_FIRST: tl.constexpr, MASKED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries; with STATS give what the backward pass needs instead of the output."""
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
    if STATS:
        dout = _load(
            _rows(dout_ptr, b, head, qy, qx, stride_dout_b, stride_dout_h, stride_dout_y, stride_dout_x),
            q_in,
            q_ptr,
            head,
            HEAD_DIM,
            BLOCK_D,
            False,
        )
    largest = tl.full([BLOCK_Q], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
        s = _scores(
            q,
            k,
            qi,
            ki,
            q_region,
            k_region,
            bias_ptr,
            head,
            queries,
            keys,
            scale,
            HAS_BIAS,
            MASKED,
            PRECISION,
        )
        place = (b.to(tl.int64) * heads + head) * keys + ki
        if HAS_FIRST and not STATS:
            row = tl.sum(tl.where((qi == 0)[:, None], s, 0.0), axis=0)
            tl.store(first_ptr + place, row, mask=(ki < keys) & (tl.program_id(0) == 0))
        best = tl.maximum(largest, tl.max(s, axis=1))
        shrink = tl.exp2(largest - best)
        p = tl.exp2(s - best[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        if STATS:
            # from the very products that it is subtracted from later; by way of the output it would be less exact
            dp = _dot(dout, tl.trans(v), PRECISION)
            if HAS_FIRST:
                dfirst = tl.load(dfirst_ptr + b.to(tl.int64) * keys + ki, mask=ki < keys, other=0.0)
                dp += tl.where((qi == 0)[:, None], dfirst[None, :], 0.0)
            mean = mean * shrink + tl.sum(p * dp, axis=1)
        else:
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, PRECISION)
        largest = best
    # NaN, as softmax has it, for a query whose scores are all -inf; their sum is 0
    total = tl.where(total > 0.0, total, 1.0)
    place = (item.to(tl.int64) * heads + head) * queries + qi
    tl.store(lse_ptr + place, largest + tl.log2(total), mask=qi < queries)
    if STATS:
        delta = tl.where(largest > -3.0e38, mean / total, float("nan"))
        tl.store(delta_ptr + place, delta, mask=qi < queries)
    else:
        acc = tl.where((largest > -3.0e38)[:, None], acc / total[:, None], float("nan"))
        rows = _rows(out_ptr, b, head, qy, qx, stride_out_b, stride_out_h, stride_out_y, stride_out_x)
        _store(rows, q_in, acc.to(q.dtype), HEAD_DIM, BLOCK_D)
