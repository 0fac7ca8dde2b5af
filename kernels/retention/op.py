"""The operators vitzoo::retention and vitzoo::retention_bwd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.linear_scan import (
    chunked_linear_scan,
    compute_dtype,
    recurrence_bwd_flops,
    recurrence_flops,
)
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register
from vitzoo.kernels.retention import cpu
from vitzoo.kernels.retention.reference import MODES, retention_reference


def _reference_bwd(dout: Tensor, dstate: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(retention_reference, inputs, (dout, dstate), tuple(range(5)))


def _triton_why_not(q: Tensor | None = None, *args: Any) -> str | None:
    reason = triton_support.why_not(q)
    return (
        reason if q is None or reason is not None else triton_support.lazily("retention", "why_not")(q, *args)
    )


OPERATOR = Operator(
    "retention",
    backends=(
        triton_support.backend("retention", _triton_why_not),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": retention_reference, "backward": _reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, dk = q.shape
    return v.new_empty(v.shape), q.new_empty((batch, heads, dk, v.shape[3]), dtype=compute_dtype(q))


def _flops(q: Any, k: Any, v: Any, *options: Any) -> int:
    return recurrence_flops(q[0], q[1], q[2], q[3], v[3])


def _backward_flops(dout: Any, dstate: Any, q: Any, k: Any, v: Any, *options: Any) -> int:
    return recurrence_bwd_flops(q[0], q[1], q[2], q[3], v[3])


_call = register(
    OPERATOR,
    "Tensor q, Tensor k, Tensor v, Tensor gammas, Tensor? initial_state, float scale, str mode, int chunk_size",
    ("out", "final_state"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    # q, k and v stay as they come
    autocast_wide=("gammas", "initial_state"),
)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gammas: Tensor, state: Tensor | None, mode: str, chunk_size: int
) -> None:
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, L, heads, K) with positive heads and K")
    batch, seqlen, heads, dk = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected that of q, {tuple(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, expected (B, L, heads, V) = ({batch}, {seqlen}, {heads}, V)"
        )
    if gammas.shape != (heads,):
        raise ValueError(f"gammas has shape {tuple(gammas.shape)}, expected (heads,) = ({heads},)")
    expected = (batch, heads, dk, v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(
            f"initial_state has shape {tuple(state.shape)}, expected (B, heads, K, V) = {expected}"
        )
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    named = {"q": q, "k": k, "v": v, "gammas": gammas, "initial_state": state}
    for name, value in named.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
        if value is not None and value.device != q.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of q, {q.device}")
    for name, value in (("k", k), ("v", v)):
        if (value.dtype == torch.float64) != (q.dtype == torch.float64):
            raise ValueError(f"{name} is {value.dtype} and q {q.dtype}, expected both or neither in float64")


def _decays(gammas: Tensor | Sequence[float], device: torch.device) -> Tensor:
    if isinstance(gammas, Tensor):
        return gammas
    for gamma in gammas:
        if not 0 < gamma <= 1:
            raise ValueError(f"gammas holds {gamma}, expected decays above 0 and at most 1")
    return torch.tensor(list(gammas), dtype=torch.float64, device=device)


def _exported(
    q: Tensor, k: Tensor, v: Tensor, gammas: Tensor, state: Tensor | None, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return out and final state by matrix products alone, which the exporters translate."""
    dtype = compute_dtype(q)
    log_decay = gammas.double().log().to(dtype).expand(1, q.shape[1], -1)
    state = None if state is None else state.to(dtype)
    out, final = chunked_linear_scan(q.to(dtype) * scale, k.to(dtype), v.to(dtype), log_decay, state, chunk)
    return out.to(v.dtype), final


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gammas: Tensor | Sequence[float],
    scale: float | None = None,
    initial_state: Tensor | None = None,
    mode: str = "chunkwise",
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run retention: linear attention whose memory of a token decays by a constant factor of the head.

    S_t = gamma S_{t-1} + k_t v_t^T, from the initial state;  o_t = scale q_t S_t. No softmax and no normalisation. The
    three forms give the same numbers up to rounding: `mode` and `chunk_size` say how the reference computes (and how
    an exported graph is written); the other backends have one chunked kernel, with a chunk of their own.

    The state is float32 for inputs of at most 32 bits and float64 for float64 inputs. Every tensor has a gradient,
    also through the final state; second derivatives are refused.

    Args:
        q: queries, (B, L, heads, K), float32, float64, bfloat16 or float16.
        k: keys, (B, L, heads, K).
        v: values, (B, L, heads, V).
        gammas: decay of each head, (heads,), above 0; a sequence of numbers is taken in float64.
        scale: factor of q; None for K^-0.5.
        initial_state: state before the first token, (B, heads, K, V); None for zero.
        mode: "parallel", "recurrent" or "chunkwise".
        chunk_size: tokens of a chunk.
        return_final_state: return the state after the last token too.

    Returns:
        out, (B, L, heads, V), contiguous, dtype of v; with `return_final_state` also the state, (B, heads, K, V),
        float32 or float64.

    Raises:
        ValueError: a shape, dtype, device, mode or size that does not fit; the message names the argument, its value
            and what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: RetNet (arXiv 2307.08621), equations 3 to 7; ViR (arXiv 2310.19731).
    """
    gammas = _decays(gammas, q.device)
    _check(q, k, v, gammas, initial_state, mode, chunk_size)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if q.shape[1] == 0:
        empty = q.new_zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=compute_dtype(q))
        state = empty if initial_state is None else initial_state.to(empty.dtype) + empty
        return (v.clone(), state) if return_final_state else v.clone()
    if exporting():
        chunk = q.shape[1] if mode == "parallel" else chunk_size
        out, state = _exported(q, k, v, gammas, initial_state, scale, chunk)
    else:
        out, state = _call(q, k, v, gammas, initial_state, scale, mode, chunk_size)
    return (out, state) if return_final_state else out
