"""The operators vitzoo::ssd_scan and vitzoo::ssd_scan_bwd, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.linear_scan import compute_dtype, recurrence_bwd_flops, recurrence_flops
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register
from vitzoo.kernels.ssd_scan import cpu
from vitzoo.kernels.ssd_scan.reference import ssd_scan_chunked, ssd_scan_reference


def _reference_bwd(dout: Tensor, dstate: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(ssd_scan_reference, inputs, (dout, dstate), tuple(range(8)))


def _triton_why_not(x: Tensor | None = None, *args: Any) -> str | None:
    reason = triton_support.why_not(x)
    return (
        reason if x is None or reason is not None else triton_support.lazily("ssd_scan", "why_not")(x, *args)
    )


OPERATOR = Operator(
    "ssd_scan",
    backends=(
        triton_support.backend("ssd_scan", _triton_why_not),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": ssd_scan_reference, "backward": _reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, headdim = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, heads, headdim, B.shape[3]), dtype=compute_dtype(x))


def _flops(x: Any, dt: Any, A: Any, B: Any, *options: Any) -> int:
    return recurrence_flops(x[0], x[1], x[2], B[3], x[3])


def _backward_flops(dout: Any, dstate: Any, x: Any, dt: Any, A: Any, B: Any, *options: Any) -> int:
    return recurrence_bwd_flops(x[0], x[1], x[2], B[3], x[3])


_call = register(
    OPERATOR,
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus",
    ("out", "final_states"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    # x, B, C and z stay as they come: widening x and z would double their memory
    autocast_wide=("dt", "A", "D", "dt_bias"),
)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **optional: Tensor | None) -> None:
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (B, L, heads, headdim) with positive heads and headdim"
        )
    batch, seqlen, heads, headdim = x.shape
    expected = {
        "dt": ("(B, L, heads)", dt, ((batch, seqlen, heads),)),
        "A": ("(heads,)", A, ((heads,),)),
        "D": ("(heads,) or (heads, headdim)", optional["D"], ((heads,), (heads, headdim))),
        "z": ("(B, L, heads, headdim)", optional["z"], (x.shape,)),
        "dt_bias": ("(heads,)", optional["dt_bias"], ((heads,),)),
    }
    for name, (form, value, shapes) in expected.items():
        if value is not None and tuple(value.shape) not in [tuple(s) for s in shapes]:
            wanted = " or ".join(str(tuple(s)) for s in shapes)
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {form} = {wanted}")
    if (
        B.ndim != 4
        or B.shape[:2] != x.shape[:2]
        or 0 in B.shape[2:]
        or heads % B.shape[2]
        or C.shape != B.shape
    ):
        raise ValueError(
            f"B has shape {tuple(B.shape)} and C {tuple(C.shape)}, expected both (B, L, G, N) = "
            f"({batch}, {seqlen}, G, N) with G a divisor of {heads}"
        )
    for name, value in {"x": x, "dt": dt, "A": A, "B": B, "C": C, **optional}.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2: a linear recurrence over the tokens with one decay a head.

    dt = softplus(dt + dt_bias);  S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, from S_0 = 0;  y_t = S_t C_t + D x_t;
    out = y silu(z). Bias, softplus, D and z are optional.

    The state is float32 for inputs of at most 32 bits and float64 for float64 inputs, whatever autocast says. Every
    input has a gradient, also through the final states; second derivatives are refused.

    Args:
        x: input, (B, L, heads, headdim), float32, float64, bfloat16 or float16.
        dt: step size before bias and softplus, (B, L, heads).
        A: rate of each head, (heads,); negative where states decay.
        B: how the input enters the state, (B, L, G, N); head h reads group h // (heads / G).
        C: how the state is read, (B, L, G, N).
        D: skip weight, (heads,) or (heads, headdim).
        z: gate before silu, (B, L, heads, headdim).
        dt_bias: added to dt, (heads,).
        dt_softplus: apply softplus to dt.
        return_final_states: return the states after the last token too.

    Returns:
        out, (B, L, heads, headdim), contiguous, dtype of x; with `return_final_states` also the states, (B, heads,
        headdim, N), float32 or float64.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names the argument, its value and what was
            expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Mamba-2 (arXiv 2405.21060), sections 3 and 6; state-spaces/mamba v2.0.4, ssd_selective_scan.
    """
    _check(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias)
    if exporting():
        out, states = ssd_scan_chunked(x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    else:
        out, states = _call(x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return (out, states) if return_final_states else out
