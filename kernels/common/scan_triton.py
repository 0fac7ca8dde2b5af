"""Launches the kernels of `scan_kernels.py` for one to four routes of one input into one output.

The interface is that of the CPU's routed scan: lists with one entry a route, u with one entry where all routes read the
same, everything in the order of the image, routes numbered 0 rows, 1 columns, 2 rows from the end, 3 columns from the
end. The two routes over rows are one launch, and so are those over columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vitzoo.kernels.common import scan_kernels as kernels

# Elements of a program's tile: 8 a thread in the forward pass, 4 in the backward pass, which keeps twice as many tiles.
TILE = 1024
WARPS, BACKWARD_WARPS = 4, 8
_recorded: list[tuple[Any, dict[str, Any], int]] | None = None


class Gradients(NamedTuple):
    """Gradients in the forms of the inputs; None where an input is absent."""

    u: list[Tensor]
    delta: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    D: list[Tensor] | None
    z: Tensor | None
    delta_bias: list[Tensor] | None


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any], warps: int = WARPS
) -> None:
    if _recorded is not None:
        _recorded.append((kernel, arguments, warps))
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=warps)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": stride for axis, stride in zip("bdl", x.stride(), strict=True)}


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter stands for a small GPU, so that tests meet both ways of walking


def tile(channels: int, seqlen: int, dstate: int, backward: bool) -> tuple[int, int]:
    """Return (BLOCK_D, BLOCK_L) for channels that share B and C.

    The backward pass writes dB and dC once for each block of channels, which must then not be small beside N; shorter
    chunks pay with more states between them.
    """
    longest = 64 if backward and dstate > 4 else 256
    block_l = max(16, min(longest, triton.next_power_of_2(seqlen)))
    return min(TILE // block_l, triton.next_power_of_2(channels)), block_l


class _Call:
    """The prepared arguments of one call."""

    def __init__(
        self,
        u: Sequence[Tensor],
        delta: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        C: Sequence[Tensor],
        D: Sequence[Tensor] | None,
        z: Tensor | None,
        delta_bias: Sequence[Tensor] | None,
        delta_softplus: bool,
        routes: Sequence[int],
        width: int,
        backward: bool,
    ) -> None:
        self.routes = list(routes)
        self.u = list(u) * (len(self.routes) if len(u) == 1 else 1)
        self.shared_u = len(u) == 1
        self.delta, self.z = list(delta), z
        self.A = [x.float().contiguous() for x in A]
        self.B, self.C = ([_rows(x) for x in matrices] for matrices in (B, C))
        self.D = None if D is None else [x.float().contiguous() for x in D]
        self.bias = None if delta_bias is None else [x.float().contiguous() for x in delta_bias]
        self.softplus = delta_softplus
        batch, dim, seqlen = self.u[0].shape
        self.batch, self.dim, self.seqlen, self.dstate = batch, dim, seqlen, self.A[0].shape[1]
        groups_b, groups_c = (1 if x[0].ndim == 2 else x[0].shape[1] for x in (self.B, self.C))
        self.groups = math.lcm(groups_b, groups_c)
        self.share_b, self.share_c = self.groups // groups_b, self.groups // groups_c
        channels = dim // self.groups
        self.block_d, self.block_l = tile(channels, seqlen, self.dstate, backward)
        self.parts = triton.cdiv(channels, self.block_d)
        self.chunks = triton.cdiv(seqlen, self.block_l)
        self.sizes = {
            "dim": dim,
            "seqlen": seqlen,
            "dstate": self.dstate,
            "groups": self.groups,
            "group_channels": channels,
            "parts": self.parts,
            "chunks": self.chunks,
            "height": seqlen // width,
            "width": width,
        }
        self.blocks = {"BLOCK_D": self.block_d, "BLOCK_L": self.block_l}
        self.device = self.u[0].device

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def grid(self, chunks: int | None = None) -> tuple[int, int, int]:
        return self.chunks if chunks is None else chunks, self.groups * self.parts, self.batch

    def passes(self) -> Iterator[tuple[bool, int | None, int | None]]:
        """Yield, for rows and then columns, whether it is columns and which routes go ahead and back."""
        for columns in (False, True):
            ahead, back = (
                self.routes.index(code) if code in self.routes else None
                for code in ((1, 3) if columns else (0, 2))
            )
            if ahead is not None or back is not None:
                yield columns, ahead, back

    def inputs(self, ahead: int | None, back: int | None, columns: bool) -> dict[str, Any]:
        """Return what the forward and the backward kernel have in common."""
        first = ahead if ahead is not None else back
        second = back if back is not None else ahead
        assert first is not None
        assert second is not None
        anything = self.A[0]  # where a pointer is not read

        def pair(name: str, tensors: list[Tensor] | None) -> dict[str, Any]:
            return {
                f"{name}_ptr": anything if tensors is None else tensors[first],
                f"{name}_b_ptr": anything if tensors is None else tensors[second],
            }

        z = self.z if self.z is not None else self.u[0]
        return {
            **pair("u", self.u),
            **pair("delta", self.delta),
            **pair("A", self.A),
            **pair("B", self.B),
            **pair("C", self.C),
            **pair("D", self.D),
            **pair("bias", self.bias),
            "z_ptr": z,
            **_strides("u", self.u[first]),
            **_strides("ub", self.u[second]),
            **_strides("delta", self.delta[first]),
            **_strides("deltab", self.delta[second]),
            **_strides("z", z),
            **self.sizes,
            "share_B": self.share_b,
            "share_C": self.share_c,
            "AHEAD": ahead is not None,
            "BACK": back is not None,
            "SHARED_U": self.shared_u,
            "HAS_D": self.D is not None,
            "HAS_BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus,
            "CONSTANT_B": self.B[0].ndim == 2,
            "CONSTANT_C": self.C[0].ndim == 2,
            "COLUMNS": columns,
            **self.blocks,
        }

    def bounds(self, route: int, start: Tensor | None = None, dout: Tensor | None = None) -> Tensor:
        """Return the states (with dout, the gradients of states) that enter each chunk, (B, chunks, N, D).

        Args:
            route: which.
            start: what enters the first chunk on the way, (B, N, D).
            dout: gradient of the output, (B, D, L).
        """
        if self.chunks == 1 and start is not None:
            return start
        bounds = self.new(self.batch, self.chunks, self.dstate, self.dim)
        total = self.new(self.batch, self.chunks, self.dim)
        gradient, backwards = dout is not None, self.routes[route] >= 2
        x = self.u[route] if dout is None else dout
        matrix = self.C[route] if gradient else self.B[route]
        z = self.z if self.z is not None else x
        arguments = {
            "x_ptr": x,
            "z_ptr": z,
            "delta_ptr": self.delta[route],
            "bias_ptr": self.A[route] if self.bias is None else self.bias[route],
            "A_ptr": self.A[route],
            "M_ptr": matrix,
            "bounds_ptr": bounds,
            "total_ptr": total,
            **_strides("x", x),
            **_strides("z", z),
            **_strides("delta", self.delta[route]),
            **self.sizes,
            "share": self.share_c if gradient else self.share_b,
            "GRADIENT": gradient,
            "REVERSE": backwards != gradient,
            "HAS_BIAS": self.bias is not None,
            "HAS_Z": self.z is not None,
            "SOFTPLUS": self.softplus,
            "CONSTANT": matrix.ndim == 2,
            "COLUMNS": self.routes[route] % 2 == 1,
            **self.blocks,
        }
        _launch(kernels._scan_bounds_kernel, self.grid(), self.device, arguments)
        arguments = {
            "bounds_ptr": bounds,
            "total_ptr": total,
            "A_ptr": self.A[route],
            "start_ptr": bounds if start is None else start,
            "dim": self.dim,
            "dstate": self.dstate,
            "chunks": self.chunks,
            "HAS_START": start is not None,
            "REVERSE": backwards != gradient,
            "BLOCK_D": 128,
        }
        grid = triton.cdiv(self.dim, 128), self.dstate, self.batch
        _launch(kernels._scan_join_kernel, grid, self.device, arguments)
        return bounds


def _rows(matrix: Tensor) -> Tensor:
    """Return B or C contiguous, as (B, G, N, L) or, constant, (D, N)."""
    return (matrix.unsqueeze(1) if matrix.ndim == 3 else matrix).contiguous()


def forward(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    z: Tensor | None,
    delta_bias: Sequence[Tensor] | None,
    delta_softplus: bool,
    routes: Sequence[int],
    width: int,
    want_last: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return out, (B, D, L) in the dtype of u, and with `want_last` the last state (B, D, N) of the only route, 0."""
    k = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, routes, width, backward=False)
    out = k.new(*k.u[0].shape, dtype=k.u[0].dtype)
    passes = list(k.passes())
    total = out if len(passes) == 1 or out.dtype == torch.float32 else k.new(*out.shape)
    in_turn = k.routes == [0] and k.chunks > 1 and k.batch * k.groups * k.parts >= 2 * _processors(k.device)
    end = k.new(k.batch, k.dstate, k.dim) if want_last or in_turn else None
    if in_turn and end is not None:
        end.zero_()
    for number, (columns, ahead, back) in enumerate(passes):
        final = number == len(passes) - 1
        starts: dict[int | None, Tensor] = {}
        if k.chunks > 1 and not in_turn:
            starts = {route: k.bounds(route) for route in (ahead, back) if route is not None}
        unread = end if end is not None else k.A[0]
        arguments = {
            **k.inputs(ahead, back, columns),
            "sum_ptr": total,
            "out_ptr": out if final else total,
            "start_ptr": starts.get(ahead, unread),
            "start_b_ptr": starts.get(back, unread),
            "end_ptr": unread,
            "HAS_Z": final and k.z is not None,
            "ADD": number > 0,
            "HAS_START": k.chunks > 1,
            "WANT_END": end is not None,
            "SEQUENTIAL": in_turn,
        }
        _launch(kernels._scan_fwd_kernel, k.grid(1 if in_turn else None), k.device, arguments)
    return out, end.transpose(1, 2) if want_last and end is not None else None


def _fold(partial: Tensor, matrix: Tensor) -> Tensor:
    """Add up the parts of dB or dC and bring them to the form of B or C."""
    total = partial.sum(1)  # (B, groups, N, L) or, constant, (B, N, D)
    if matrix.ndim == 2:
        return total.sum(0).transpose(0, 1)
    groups = 1 if matrix.ndim == 3 else matrix.shape[1]
    if total.shape[1] != groups:
        total = total.unflatten(1, (groups, -1)).sum(2)
    return total.squeeze(1) if matrix.ndim == 3 else total


def backward(
    dout: Tensor,
    dlast: Tensor | None,
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    z: Tensor | None,
    delta_bias: Sequence[Tensor] | None,
    delta_softplus: bool,
    routes: Sequence[int],
    width: int,
) -> Gradients:
    """Return the gradients; dlast, (B, D, N), is that of the last state of the only route, 0, or None.

    A gate is for routes over rows alone.
    """
    k = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, routes, width, backward=True)
    passes = list(k.passes())
    assert z is None or len(passes) == 1
    start = None if dlast is None else dlast.float().transpose(1, 2).contiguous()
    like = [k.new(*x.shape, dtype=x.dtype) for x in u]
    du = like * (len(k.routes) if k.shared_u else 1)
    total = du[0] if len(passes) == 1 or du[0].dtype == torch.float32 else k.new(*du[0].shape)
    ddelta = [k.new(*x.shape, dtype=x.dtype) for x in k.delta]
    dz = None if z is None else k.new(*z.shape, dtype=z.dtype)
    by_chunk = k.batch, k.chunks

    def partial(matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:
            return k.new(*by_chunk, k.dstate, k.dim)
        return k.new(k.batch, k.parts, k.groups, k.dstate, k.seqlen)

    def by_channel(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if tensors is None else [k.new(*by_chunk, k.dim) for _ in tensors]

    dA = [k.new(*by_chunk, k.dstate, k.dim) for _ in k.A]
    dB, dC = [partial(x) for x in k.B], [partial(x) for x in k.C]
    dD, dbias = by_channel(k.D), by_channel(k.bias)
    has_carry = k.chunks > 1 or start is not None
    for number, (columns, ahead, back) in enumerate(passes):
        final = number == len(passes) - 1
        present = [route for route in (ahead, back) if route is not None]
        starts: dict[int | None, Tensor] = {}
        carries: dict[int | None, Tensor] = {}
        if k.chunks > 1:
            starts = {route: k.bounds(route) for route in present}
        if has_carry:
            carries = {route: k.bounds(route, start, dout) for route in present}
        first, second = present[0], present[-1]

        def pair(
            name: str, tensors: list[Tensor] | None, first: int = first, second: int = second
        ) -> dict[str, Any]:
            return {
                f"{name}_ptr": k.A[0] if tensors is None else tensors[first],
                f"{name}_b_ptr": k.A[0] if tensors is None else tensors[second],
            }

        arguments = {
            **k.inputs(ahead, back, columns),
            "dout_ptr": dout,
            **_strides("dout", dout),
            "sum_ptr": total,
            "start_ptr": starts.get(ahead, k.A[0]),
            "start_b_ptr": starts.get(back, k.A[0]),
            "carry_ptr": carries.get(ahead, k.A[0]),
            "carry_b_ptr": carries.get(back, k.A[0]),
            **pair("du", du if final else [total] * len(k.routes)),
            **pair("ddelta", ddelta),
            "dz_ptr": k.A[0] if dz is None else dz,
            **pair("dA", dA),
            **pair("dB", dB),
            **pair("dC", dC),
            **pair("dD", dD),
            **pair("dbias", dbias),
            "HAS_Z": z is not None,
            "ADD": number > 0,
            "HAS_START": k.chunks > 1,
            "HAS_CARRY": has_carry,
        }
        _launch(kernels._scan_bwd_kernel, k.grid(), k.device, arguments, BACKWARD_WARPS)
    return Gradients(
        like,
        ddelta,
        [x.sum((0, 1)).transpose(0, 1) for x in dA],
        [_fold(x, matrix) for x, matrix in zip(dB, B, strict=True)],
        [_fold(x, matrix) for x, matrix in zip(dC, C, strict=True)],
        None if dD is None else [x.sum((0, 1)) for x in dD],
        dz,
        None if dbias is None else [x.sum((0, 1)) for x in dbias],
    )


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launches(call: Callable[[], Any]) -> tuple[tuple[Any, dict[str, str], dict[str, Any], int], ...]:
    """Return the kernels that a call on meta tensors would launch, as `triton_support.compile_ahead` takes them."""
    global _recorded
    _recorded = []
    try:
        call()
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
            elif name.isupper() or value == 1:
                signature[name], constants[name] = "constexpr", value  # Triton makes every 1 a constant
            else:
                signature[name] = "i64" if name.startswith("stride") else "i32"
        entry = (kernel, signature, constants, warps)
        if entry not in ahead:
            ahead.append(entry)
    return tuple(ahead)
