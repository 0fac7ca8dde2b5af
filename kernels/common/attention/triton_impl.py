"""Attention in Triton for rows and for windows of a map: what launches the kernels.

Tensors are seen as (B, heads, Y, X, head_dim). Rows are a map of one row; a window's token is found in the map by
arithmetic, in place of partition, shift and padding. The forward pass keeps no matrix (online softmax over blocks of
keys); the backward pass recomputes scores block by block from the log of each query's sum. No atomics: every sum has
one program and one order.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.attention.triton_backward import (
    _attention_bwd_bias_kernel,
    _attention_bwd_kv_kernel,
    _attention_bwd_q_kernel,
)
from vitzoo.kernels.common.attention.triton_forward import _attention_fwd_kernel


@dataclass(frozen=True)
class Windows:
    """How a map is cut: sizes (vertical, horizontal), and what comes first on a map that is padded and shifted."""

    window: tuple[int, int]
    shift: tuple[int, int]
    roll_first: bool


@dataclass
class Call:
    """One call; tensors are (B, heads, Y, X, head_dim) with contiguous head_dim.

    Attributes:
        q, k, v: queries, keys and values; rows have Y = 1.
        scale: factor of the scores.
        windows: None for rows.
        bias: (heads, M, M), contiguous, or None.
        pad: (3*C,), contiguous, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    windows: Windows | None = None
    bias: Tensor | None = None
    pad: Tensor | None = None

    def sizes(self) -> tuple[int, int, int]:
        """Return windows of a map, queries and keys of a window."""
        if self.windows is None:
            return 1, self.q.shape[3], self.k.shape[3]
        (height, width), (win_h, win_w) = self.q.shape[2:4], self.windows.window
        return -(-height // win_h) * -(-width // win_w), win_h * win_w, win_h * win_w


def blocks(queries: int, keys: int, head_dim: int) -> tuple[int, int, int]:
    """Return queries, keys and channels of a block."""
    largest = 64 if head_dim <= 128 else 32

    def block(count: int) -> int:
        return min(largest, max(16, triton.next_power_of_2(count)))

    return block(queries), block(keys), max(16, triton.next_power_of_2(head_dim))


_recorded: list[Any] | None = None
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _launch(kernel: Any, grid: tuple[int, ...], call: Call, tensors: dict[str, Any], **flags: Any) -> None:
    """Launch a kernel: tensors by name, strides of those with five dimensions, and what every kernel takes."""
    windows, queries, keys = call.sizes()
    _, heads, height, width, head_dim = call.q.shape
    block_q, block_k, block_d = blocks(queries, keys, head_dim)
    cut = call.windows or Windows((1, 1), (0, 0), False)
    given = {"q": call.q, "k": call.k, "v": call.v, "bias": call.bias, **tensors}
    if call.pad is not None:
        channels = heads * head_dim
        given |= {"pad_k": call.pad[channels : 2 * channels], "pad_v": call.pad[2 * channels :]}
    arguments: dict[str, Any] = {}
    for name, x in given.items():
        if x is not None and x.ndim == 5:
            for axis, stride in zip("bhyx", x.stride(), strict=False):
                arguments[f"stride_{name}_{axis}"] = stride
        arguments[f"{name}_ptr"] = x
    arguments |= {"scale": call.scale, "heads": heads, "queries": queries, "keys": keys, "windows": windows}
    arguments |= {"height": height, "width": width, "win_h": cut.window[0], "win_w": cut.window[1]}
    arguments |= {"shift_h": cut.shift[0], "shift_w": cut.shift[1]}
    arguments |= {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    arguments |= {"WINDOWED": call.windows is not None, "ROLL_FIRST": cut.roll_first}
    arguments |= {
        "MASKED": any(cut.shift),
        "HAS_PAD": call.pad is not None,
        "HAS_BIAS": call.bias is not None,
    }
    precision = "ieee" if call.q.dtype == torch.float32 else "tf32"
    arguments |= {"PRECISION": "interpreted" if triton_support.interpreting() else precision, **flags}
    for name in kernel.arg_names:  # absent tensors: any pointer, never read
        if name.endswith("_ptr") and arguments.get(name) is None:
            arguments[name] = call.q
        elif name.startswith("stride_"):
            arguments.setdefault(name, 0)
    arguments = {name: arguments[name] for name in kernel.arg_names}
    warps = 4 if block_q * block_k < 4096 or block_d <= 64 else 8
    if _recorded is not None:
        _recorded.append((kernel, arguments, warps))
        return
    on_device = torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext()
    with on_device:
        kernel[grid](**arguments, num_warps=warps)


def _grid(call: Call, of_keys: bool = False) -> tuple[int, int, int]:
    windows, queries, keys = call.sizes()
    block_q, block_k, _ = blocks(queries, keys, call.q.shape[4])
    first = -(-keys // block_k) if of_keys else -(-queries // block_q)
    return first, call.q.shape[0] * windows, call.q.shape[1]


def _per_query(call: Call) -> Tensor:
    windows, queries, _ = call.sizes()
    size = (call.q.shape[0] * windows, call.q.shape[1], queries)
    return torch.empty(size, dtype=torch.float32, device=call.q.device)


def forward(call: Call, out: Tensor, with_first: bool = False) -> Tensor | None:
    """Write the output to `out`, as q; return the weights of query 0, (B, heads, keys), float32, if wanted."""
    lse, first = _per_query(call), None
    if with_first:
        size = (*call.q.shape[:2], call.k.shape[3])
        first = torch.empty(size, dtype=torch.float32, device=call.q.device)
    tensors = {"out": out, "lse": lse, "first": first}
    _launch(_attention_fwd_kernel, _grid(call), call, tensors, HAS_FIRST=with_first, STATS=False)
    return None if first is None else torch.exp2(first - lse[:, :, :1])


PARTS = 32  # of all windows, whose sums of dbias are added up in a fixed order


def backward(
    call: Call, dout: Tensor, dfirst: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of q, k and v; return those of bias and pad, float32, None where absent.

    Args:
        call: the forward call.
        dout: gradient of the output, as q.
        dfirst: gradient of the weights of query 0 of every head, (B, keys), float32, contiguous; or None.
        dq: as q, to be written.
        dk: as k, to be written.
        dv: as v, to be written.
    """
    flags = {"HAS_FIRST": dfirst is not None}
    read = {"dout": dout, "dfirst": dfirst, "lse": _per_query(call), "delta": _per_query(call)}
    _launch(_attention_fwd_kernel, _grid(call), call, read, STATS=True, **flags)
    _launch(_attention_bwd_q_kernel, _grid(call), call, read | {"dq": dq}, **flags)
    grid, heads, head_dim = _grid(call, of_keys=True), call.q.shape[1], call.q.shape[4]
    dpad = dbias = None
    if call.pad is not None:
        dpad = dout.new_empty((grid[1], grid[0], 2, heads, head_dim), dtype=torch.float32)
    _launch(_attention_bwd_kv_kernel, grid, call, read | {"dk": dk, "dv": dv, "dpad": dpad}, **flags)
    if call.bias is not None:
        items, (_, queries, keys) = grid[1], call.sizes()
        per_part = -(-items // PARTS)
        parts = -(-items // per_part)
        block_q, block_k, _ = blocks(queries, keys, head_dim)
        squares = -(-queries // block_q) * -(-keys // block_k)
        dbias = dout.new_empty((parts, *call.bias.shape), dtype=torch.float32)
        flags |= {"items": items, "per_part": per_part}
        _launch(_attention_bwd_bias_kernel, (squares, parts, heads), call, read | {"dbias": dbias}, **flags)
        dbias = dbias.sum(0)
    if dpad is not None:
        shares = dpad.sum((0, 1)).flatten()
        dpad = torch.cat([torch.zeros_like(shares[: heads * head_dim]), shares])
    return dbias, dpad


def launches(run: Any) -> tuple[Any, ...]:
    """Return the kernels that a call on meta tensors would launch, as `triton_support.compile_ahead` takes them."""
    global _recorded
    _recorded = []
    try:
        run()
        found = _recorded
    finally:
        _recorded = None
    ahead = []
    for kernel, arguments, warps in found:
        signature, constants = {}, {}
        for name in kernel.arg_names:
            value = arguments[name]
            if isinstance(value, Tensor):
                signature[name] = _TYPES[value.dtype]
            elif name.isupper():
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if name == "scale" else "i64" if name.startswith("stride") else "i32"
        entry = (kernel, signature, constants, warps)
        if entry not in ahead:
            ahead.append(entry)
    return tuple(ahead)
