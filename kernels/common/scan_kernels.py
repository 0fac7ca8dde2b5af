"""Triton kernels of the selective scans, over one or both directions of one order of the tokens.

The tokens are cut into chunks of BLOCK_L, and a program takes one chunk of BLOCK_D channels that share B and C: a tile
(BLOCK_D, BLOCK_L) of u, delta and z is read once, and for each state the recurrence runs within the tile as an
associative scan. A direction from the last token to the first is the same scan in reverse, on the same tile: nothing is
flipped, and the results of both are added in registers.

What enters a chunk is found first. The state that a chunk adds is a weighted sum over its tokens, whose weights are
exponentials of summed steps (`_scan_bounds_kernel`, no scan); `_scan_join_kernel` then runs over the chunks. The same
two kernels give the gradients that enter a chunk. So all chunks run at once, and the backward pass keeps no state of a
token. Where channels alone fill the GPU the forward pass walks its chunks in turn instead (SEQUENTIAL) and reads u and
delta once.

Sums and states are float32. Small tensors come contiguous: A (D, N) and D, delta_bias (D,) in float32, B and C
(B, G, N, L) or, constant, (D, N). Sums over channels (dB, dC) and over chunks (dA, dD, ddelta_bias) are written in
parts, which the caller adds up: no atomics, one result whatever the order of programs.

Legend: s step, x input, h state, g gradient of h, a = exp(s A); `_b` the direction from the last token to the first;
place: where a token lies in memory, which for COLUMNS is not its number.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _compose(a, h, a_next, h_next):
    return a * a_next, a_next * h + h_next


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _softplus(x):
    # log(1 + e) as 2 artanh(w): the hardware's logarithm is off by 1e-7 in absolute terms
    e = tl.exp(-tl.abs(x))
    w = e / (2.0 + e)
    square = w * w
    p = 2.0 / 15.0 * square + 2.0 / 13.0
    p = p * square + 2.0 / 11.0
    p = p * square + 2.0 / 9.0
    p = p * square + 2.0 / 7.0
    p = p * square + 2.0 / 5.0
    p = p * square + 2.0 / 3.0
    p = p * square + 2.0
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + p * w)


@triton.jit
def _places(tokens, height, width, COLUMNS: tl.constexpr):
    if COLUMNS:
        return (tokens % height).to(tl.int64) * width + tokens // height
    else:
        return tokens.to(tl.int64)


@triton.jit
def _tile(ptr, channels, places, stride_d, stride_l, mask):
    offsets = channels[:, None] * stride_d + places[None, :] * stride_l
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before_softplus(
    delta_ptr, bias_ptr, channels, places, stride_d, stride_l, inside_d, mask, HAS_BIAS: tl.constexpr
):
    x = _tile(delta_ptr, channels, places, stride_d, stride_l, mask)
    if HAS_BIAS:
        x += tl.load(bias_ptr + channels, mask=inside_d, other=0.0)[:, None]
    return x


@triton.jit
def _steps(x, mask, SOFTPLUS: tl.constexpr):
    """Return the steps, zero outside: such a token leaves the state as it is."""
    if SOFTPLUS:
        x = _softplus(x)
    return tl.where(mask, x, 0.0)


@triton.jit
def _row(ptr, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT: tl.constexpr):
    """Return B or C of one state, (1, BLOCK_L) shared by the channels, or (BLOCK_D, 1) where it is constant."""
    if CONSTANT:
        return tl.load(ptr + channels * dstate + n, mask=inside_d, other=0.0).to(tl.float32)[:, None]
    else:
        row = ptr + tl.cast(n, tl.int64) * seqlen
        return tl.load(row + places, mask=inside_l, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _matrix(ptr, batch, group, share, groups, dstate, seqlen, CONSTANT: tl.constexpr):
    """Return where B or C (B, groups / share, N, L) of one image and group starts."""
    if CONSTANT:
        return ptr
    else:
        return ptr + (batch * (groups // share) + group // share) * dstate * seqlen


@triton.jit
def _direction_fwd(
    x, s, A_ptr, B_ptr, C_ptr, D_ptr, start_ptr, end_ptr, channels, places, inside_d, inside_l, dim, seqlen, dstate,
    is_last, HAS_D: tl.constexpr, HAS_START: tl.constexpr, WANT_END: tl.constexpr, CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr, REVERSE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    drive = s * x
    if HAS_D:
        y = tl.load(D_ptr + channels, mask=inside_d, other=0.0)[:, None] * x
    else:
        y = tl.zeros_like(x)
    for n in range(dstate):
        rate = tl.load(A_ptr + channels * dstate + n, mask=inside_d, other=0.0)[:, None] * LOG2E
        b = _row(B_ptr, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT_B)
        product, h = tl.associative_scan((tl.exp2(s * rate), drive * b), 1, _compose, reverse=REVERSE)
        if HAS_START:
            start = tl.load(start_ptr + tl.cast(n, tl.int64) * dim + channels, mask=inside_d, other=0.0)
            h += product * start[:, None]
        if WANT_END:
            final = (tl.arange(0, BLOCK_L) == BLOCK_L - 1)[None, :]
            end = tl.sum(tl.where(final, h, 0.0), axis=1)
            tl.store(end_ptr + tl.cast(n, tl.int64) * dim + channels, end, mask=inside_d & is_last)
        c = _row(C_ptr, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT_C)
        y += h * c
    return y


@triton.jit
def _scan_fwd_kernel(
    u_ptr, u_b_ptr, delta_ptr, delta_b_ptr, A_ptr, A_b_ptr, B_ptr, B_b_ptr, C_ptr, C_b_ptr, D_ptr, D_b_ptr,
    bias_ptr, bias_b_ptr, z_ptr, sum_ptr, out_ptr, start_ptr, start_b_ptr, end_ptr,
    stride_u_b, stride_u_d, stride_u_l, stride_ub_b, stride_ub_d, stride_ub_l,
    stride_delta_b, stride_delta_d, stride_delta_l, stride_deltab_b, stride_deltab_d, stride_deltab_l,
    stride_z_b, stride_z_d, stride_z_l,
    dim, seqlen, dstate, groups, group_channels, parts, share_B, share_C, chunks, height, width,
    AHEAD: tl.constexpr, BACK: tl.constexpr, SHARED_U: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_START: tl.constexpr, WANT_END: tl.constexpr,
    SEQUENTIAL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    batch = tl.program_id(2).to(tl.int64)
    lanes = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = lanes < group_channels
    channels = group.to(tl.int64) * group_channels + lanes
    first = tl.program_id(0)
    if SEQUENTIAL:
        last = chunks
    else:
        last = first + 1
    for chunk in range(first, last):
        tokens = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        inside_l = tokens < seqlen
        mask = inside_d[:, None] & inside_l[None, :]
        places = _places(tokens, height, width, COLUMNS)
        # a sequential walk reads and writes one slot
        slot = (batch * chunks + chunk) * dstate * dim
        is_last = chunk == chunks - 1
        if SEQUENTIAL:
            slot = batch * dstate * dim
            is_last = chunk >= 0
        y = tl.zeros((BLOCK_D, BLOCK_L), tl.float32)
        if ADD:
            y += _tile(sum_ptr + batch * dim * seqlen, channels, places, seqlen, 1, mask)
        if AHEAD:
            x = _tile(u_ptr + batch * stride_u_b, channels, places, stride_u_d, stride_u_l, mask)
            before = _before_softplus(
                delta_ptr + batch * stride_delta_b, bias_ptr, channels, places, stride_delta_d, stride_delta_l,
                inside_d, mask, HAS_BIAS,
            )  # fmt: skip
            y += _direction_fwd(
                x, _steps(before, mask, SOFTPLUS), A_ptr,
                _matrix(B_ptr, batch, group, share_B, groups, dstate, seqlen, CONSTANT_B),
                _matrix(C_ptr, batch, group, share_C, groups, dstate, seqlen, CONSTANT_C),
                D_ptr, start_ptr + slot, end_ptr + batch * dstate * dim, channels, places, inside_d, inside_l,
                dim, seqlen, dstate, is_last, HAS_D, HAS_START, WANT_END,
                CONSTANT_B, CONSTANT_C, False, BLOCK_L,
            )  # fmt: skip
        if BACK:
            if not (SHARED_U and AHEAD):
                x = _tile(u_b_ptr + batch * stride_ub_b, channels, places, stride_ub_d, stride_ub_l, mask)
            before = _before_softplus(
                delta_b_ptr + batch * stride_deltab_b, bias_b_ptr, channels, places, stride_deltab_d,
                stride_deltab_l, inside_d, mask, HAS_BIAS,
            )  # fmt: skip
            y += _direction_fwd(
                x, _steps(before, mask, SOFTPLUS), A_b_ptr,
                _matrix(B_b_ptr, batch, group, share_B, groups, dstate, seqlen, CONSTANT_B),
                _matrix(C_b_ptr, batch, group, share_C, groups, dstate, seqlen, CONSTANT_C),
                D_b_ptr, start_b_ptr + slot, end_ptr, channels, places, inside_d, inside_l,
                dim, seqlen, dstate, is_last, HAS_D, HAS_START, False,
                CONSTANT_B, CONSTANT_C, True, BLOCK_L,
            )  # fmt: skip
        if HAS_Z:
            z = _tile(z_ptr + batch * stride_z_b, channels, places, stride_z_d, stride_z_l, mask)
            y = y * z * _sigmoid(z)
        out = out_ptr + batch * dim * seqlen + channels[:, None] * seqlen + places[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
        if SEQUENTIAL:
            tl.debug_barrier()  # the states written are read by other threads in the next chunk


@triton.jit
def _scan_bounds_kernel(
    x_ptr, z_ptr, delta_ptr, bias_ptr, A_ptr, M_ptr, bounds_ptr, total_ptr,
    stride_x_b, stride_x_d, stride_x_l, stride_z_b, stride_z_d, stride_z_l,
    stride_delta_b, stride_delta_d, stride_delta_l,
    dim, seqlen, dstate, groups, group_channels, parts, share, chunks, height, width,
    GRADIENT: tl.constexpr, REVERSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr, CONSTANT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Write what each chunk adds to the state (or, with GRADIENT, to the gradient) that leaves it, and its summed step.

    x is u with M = B, or dout with M = C; REVERSE where what is carried goes towards the first token.
    """
    chunk = tl.program_id(0)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    batch = tl.program_id(2).to(tl.int64)
    lanes = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = lanes < group_channels
    channels = group.to(tl.int64) * group_channels + lanes
    tokens = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
    inside_l = tokens < seqlen
    mask = inside_d[:, None] & inside_l[None, :]
    places = _places(tokens, height, width, COLUMNS)
    drive = _tile(x_ptr + batch * stride_x_b, channels, places, stride_x_d, stride_x_l, mask)
    before = _before_softplus(
        delta_ptr + batch * stride_delta_b, bias_ptr, channels, places, stride_delta_d, stride_delta_l, inside_d,
        mask, HAS_BIAS,
    )  # fmt: skip
    s = _steps(before, mask, SOFTPLUS)
    # steps between a token and where the chunk is left
    rest = tl.cumsum(s, axis=1, reverse=not REVERSE)
    if GRADIENT:
        if HAS_Z:
            z = _tile(z_ptr + batch * stride_z_b, channels, places, stride_z_d, stride_z_l, mask)
            drive = drive * z * _sigmoid(z)
    else:
        rest -= s  # a token's own decay does not touch what it adds
        drive *= s
    slot = batch * chunks + chunk
    tl.store(total_ptr + slot * dim + channels, tl.sum(s, axis=1), mask=inside_d)
    matrix = _matrix(M_ptr, batch, group, share, groups, dstate, seqlen, CONSTANT)
    for n in range(dstate):
        rate = tl.load(A_ptr + channels * dstate + n, mask=inside_d, other=0.0)[:, None] * LOG2E
        row = _row(matrix, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT)
        added = tl.sum(tl.exp2(rest * rate) * drive * row, axis=1)
        tl.store(bounds_ptr + (slot * dstate + n) * dim + channels, added, mask=inside_d)


@triton.jit
def _scan_join_kernel(
    bounds_ptr, total_ptr, A_ptr, start_ptr, dim, dstate, chunks, HAS_START: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds, (B, chunks, N, D), into what enters it, in place; start_ptr (B, N, D) enters first."""
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = channels < dim
    rate = tl.load(A_ptr + channels.to(tl.int64) * dstate + n, mask=inside, other=0.0) * LOG2E
    carried = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_START:
        carried = tl.load(start_ptr + (batch * dstate + n) * dim + channels, mask=inside, other=0.0)
    for turn in range(chunks):
        if REVERSE:
            slot = batch * chunks + chunks - 1 - turn
        else:
            slot = batch * chunks + turn
        total = tl.load(total_ptr + slot * dim + channels, mask=inside, other=0.0)
        place = bounds_ptr + (slot * dstate + n) * dim + channels
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, carried, mask=inside)
        carried = tl.exp2(total * rate) * carried + added


@triton.jit
def _direction_bwd(
    x, s, s_next, dy, A_ptr, B_ptr, C_ptr, start_ptr, carry_ptr, dA_ptr, dB_ptr, dC_ptr, channels, places,
    inside_d, inside_l, dim, seqlen, dstate, HAS_START: tl.constexpr, HAS_CARRY: tl.constexpr,
    WANT_Y: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Return sum_n h C (zero unless WANT_Y), sum_n g B and sum_n q A, and write dA, dB and dC of the tile."""
    drive = s * x
    y, sum_gb, sum_qa = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for n in range(dstate):
        rate = tl.load(A_ptr + channels * dstate + n, mask=inside_d, other=0.0)[:, None]
        b = _row(B_ptr, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT_B)
        c = _row(C_ptr, channels, places, n, dstate, seqlen, inside_d, inside_l, CONSTANT_C)
        state = tl.cast(n, tl.int64) * dim + channels
        added = drive * b
        product, h = tl.associative_scan((tl.exp2(s * (rate * LOG2E)), added), 1, _compose, reverse=REVERSE)
        if HAS_START:
            h += product * tl.load(start_ptr + state, mask=inside_d, other=0.0)[:, None]
        product, g = tl.associative_scan(
            (tl.exp2(s_next * (rate * LOG2E)), dy * c), 1, _compose, reverse=not REVERSE
        )
        if HAS_CARRY:
            g += product * tl.load(carry_ptr + state, mask=inside_d, other=0.0)[:, None]
        if WANT_Y:
            y += h * c
        q = g * (h - added)  # the decayed state before the token
        sum_qa += q * rate
        sum_gb += g * b
        tl.store(dA_ptr + state, tl.sum(q * s, axis=1), mask=inside_d)
        row = tl.cast(n, tl.int64) * seqlen + places
        if CONSTANT_B:
            tl.store(dB_ptr + state, tl.sum(g * drive, axis=1), mask=inside_d)
        else:
            tl.store(dB_ptr + row, tl.sum(g * drive, axis=0), mask=inside_l)
        if CONSTANT_C:
            tl.store(dC_ptr + state, tl.sum(h * dy, axis=1), mask=inside_d)
        else:
            tl.store(dC_ptr + row, tl.sum(h * dy, axis=0), mask=inside_l)
    return y, sum_gb, sum_qa


@triton.jit
def _direction_end_bwd(
    x, s, before, dy, sum_gb, sum_qa, D_ptr, ddelta_ptr, dD_ptr, dbias_ptr, channels, inside_d, mask, offsets,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Write ddelta, dD and ddelta_bias of the tile and return its dx."""
    ddelta = x * sum_gb + sum_qa
    if SOFTPLUS:
        ddelta = tl.where(before > 20.0, ddelta, ddelta * _sigmoid(before))
    ddelta = tl.where(mask, ddelta, 0.0)
    tl.store(ddelta_ptr + offsets, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
    dx = s * sum_gb
    if HAS_D:
        dx += tl.load(D_ptr + channels, mask=inside_d, other=0.0)[:, None] * dy
        tl.store(dD_ptr + channels, tl.sum(dy * x, axis=1), mask=inside_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + channels, tl.sum(ddelta, axis=1), mask=inside_d)
    return dx


@triton.jit
def _scan_bwd_kernel(
    dout_ptr, u_ptr, u_b_ptr, delta_ptr, delta_b_ptr, A_ptr, A_b_ptr, B_ptr, B_b_ptr, C_ptr, C_b_ptr, D_ptr,
    D_b_ptr, bias_ptr, bias_b_ptr, z_ptr, sum_ptr, start_ptr, start_b_ptr, carry_ptr, carry_b_ptr,
    du_ptr, du_b_ptr, ddelta_ptr, ddelta_b_ptr, dz_ptr, dA_ptr, dA_b_ptr, dB_ptr, dB_b_ptr, dC_ptr, dC_b_ptr,
    dD_ptr, dD_b_ptr, dbias_ptr, dbias_b_ptr,
    stride_dout_b, stride_dout_d, stride_dout_l,
    stride_u_b, stride_u_d, stride_u_l, stride_ub_b, stride_ub_d, stride_ub_l,
    stride_delta_b, stride_delta_d, stride_delta_l, stride_deltab_b, stride_deltab_d, stride_deltab_l,
    stride_z_b, stride_z_d, stride_z_l,
    dim, seqlen, dstate, groups, group_channels, parts, share_B, share_C, chunks, height, width,
    AHEAD: tl.constexpr, BACK: tl.constexpr, SHARED_U: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_START: tl.constexpr, HAS_CARRY: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    batch = tl.program_id(2).to(tl.int64)
    lanes = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = lanes < group_channels
    channels = group.to(tl.int64) * group_channels + lanes
    index = tl.arange(0, BLOCK_L)
    tokens = chunk * BLOCK_L + index
    inside_l = tokens < seqlen
    mask = inside_d[:, None] & inside_l[None, :]
    places = _places(tokens, height, width, COLUMNS)
    offsets = batch * dim * seqlen + channels[:, None] * seqlen + places[None, :]
    slot = batch * chunks + chunk
    states = slot * dstate * dim
    # parts of dB and dC: (B, parts, groups, N, L), or (B, chunks, N, D) where constant
    rows = ((batch * parts + part) * groups + group) * dstate * seqlen
    rows_B, rows_C = rows, rows
    if CONSTANT_B:
        rows_B = states
    if CONSTANT_C:
        rows_C = states

    dout = _tile(dout_ptr + batch * stride_dout_b, channels, places, stride_dout_d, stride_dout_l, mask)
    dy = dout
    if HAS_Z:
        z = _tile(z_ptr + batch * stride_z_b, channels, places, stride_z_d, stride_z_l, mask)
        gate = _sigmoid(z)
        dy = dout * z * gate
    y, dx = tl.zeros_like(dout), tl.zeros_like(dout)
    if ADD:
        dx += tl.load(sum_ptr + offsets, mask=mask, other=0.0)
    if AHEAD:
        x = _tile(u_ptr + batch * stride_u_b, channels, places, stride_u_d, stride_u_l, mask)
        delta = delta_ptr + batch * stride_delta_b
        before = _before_softplus(
            delta, bias_ptr, channels, places, stride_delta_d, stride_delta_l, inside_d, mask, HAS_BIAS
        )
        s = _steps(before, mask, SOFTPLUS)
        # the step of the token after, whose decay stands between the two gradients; none after the chunk's last
        there = mask & ((index < BLOCK_L - 1) & (tokens < seqlen - 1))[None, :]
        after = _places(tokens + 1, height, width, COLUMNS)
        s_next = _before_softplus(
            delta, bias_ptr, channels, after, stride_delta_d, stride_delta_l, inside_d, there, HAS_BIAS
        )
        y_ahead, sum_gb, sum_qa = _direction_bwd(
            x, s, _steps(s_next, there, SOFTPLUS), dy, A_ptr,
            _matrix(B_ptr, batch, group, share_B, groups, dstate, seqlen, CONSTANT_B),
            _matrix(C_ptr, batch, group, share_C, groups, dstate, seqlen, CONSTANT_C),
            start_ptr + states, carry_ptr + states, dA_ptr + states, dB_ptr + rows_B, dC_ptr + rows_C,
            channels, places, inside_d, inside_l, dim, seqlen, dstate, HAS_START, HAS_CARRY, HAS_Z, CONSTANT_B,
            CONSTANT_C, False,
        )  # fmt: skip
        dx += _direction_end_bwd(
            x, s, before, dy, sum_gb, sum_qa, D_ptr, ddelta_ptr, dD_ptr + slot * dim, dbias_ptr + slot * dim,
            channels, inside_d, mask, offsets, HAS_D, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        if HAS_Z:
            y += y_ahead
            if HAS_D:
                y += tl.load(D_ptr + channels, mask=inside_d, other=0.0)[:, None] * x
        if BACK and not SHARED_U:
            tl.store(du_ptr + offsets, dx.to(du_ptr.dtype.element_ty), mask=mask)
            dx = tl.zeros_like(dx)
    if BACK:
        if not (SHARED_U and AHEAD):
            x = _tile(u_b_ptr + batch * stride_ub_b, channels, places, stride_ub_d, stride_ub_l, mask)
        delta = delta_b_ptr + batch * stride_deltab_b
        before = _before_softplus(
            delta, bias_b_ptr, channels, places, stride_deltab_d, stride_deltab_l, inside_d, mask, HAS_BIAS
        )
        s = _steps(before, mask, SOFTPLUS)
        there = mask & (index > 0)[None, :]
        after = _places(tl.maximum(tokens - 1, 0), height, width, COLUMNS)
        s_next = _before_softplus(
            delta, bias_b_ptr, channels, after, stride_deltab_d, stride_deltab_l, inside_d, there, HAS_BIAS
        )
        y_back, sum_gb, sum_qa = _direction_bwd(
            x, s, _steps(s_next, there, SOFTPLUS), dy, A_b_ptr,
            _matrix(B_b_ptr, batch, group, share_B, groups, dstate, seqlen, CONSTANT_B),
            _matrix(C_b_ptr, batch, group, share_C, groups, dstate, seqlen, CONSTANT_C),
            start_b_ptr + states, carry_b_ptr + states, dA_b_ptr + states, dB_b_ptr + rows_B, dC_b_ptr + rows_C,
            channels, places, inside_d, inside_l, dim, seqlen, dstate, HAS_START, HAS_CARRY, HAS_Z, CONSTANT_B,
            CONSTANT_C, True,
        )  # fmt: skip
        dx += _direction_end_bwd(
            x, s, before, dy, sum_gb, sum_qa, D_b_ptr, ddelta_b_ptr, dD_b_ptr + slot * dim,
            dbias_b_ptr + slot * dim, channels, inside_d, mask, offsets, HAS_D, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        if HAS_Z:
            y += y_back
            if HAS_D:
                y += tl.load(D_b_ptr + channels, mask=inside_d, other=0.0)[:, None] * x
    if AHEAD and (SHARED_U or not BACK):
        tl.store(du_ptr + offsets, dx.to(du_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(du_b_ptr + offsets, dx.to(du_b_ptr.dtype.element_ty), mask=mask)
    if HAS_Z:
        dz = dout * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
