"""The operators vitzoo::selective_scan and vitzoo::selective_scan_bwd, and the public function.

One implementation serves every device and picks the backend at run time, inside the operator, so that compiled graphs
stay whole. Under torch.export the function takes another path, see onnx.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, BackendError, Operator, forced_backend
from vitzoo.kernels.common.registration import exporting, register
from vitzoo.kernels.selective_scan import cpu, cuda
from vitzoo.kernels.selective_scan.complex import complex_selective_scan
from vitzoo.kernels.selective_scan.flops import selective_scan_bwd_flops, selective_scan_flops
from vitzoo.kernels.selective_scan.reference import (
    compute_dtype,
    selective_scan_reference,
    selective_scan_reference_bwd,
)

OPERATOR = Operator(
    "selective_scan",
    backends=(
        Backend("cuda", {"forward": cuda.forward, "backward": cuda.backward}, cuda.why_not),
        triton_support.backend("selective_scan", triton_support.narrow_why_not("u")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": selective_scan_reference, "backward": selective_scan_reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _fake(u: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=compute_dtype(u))


def _options(D: Any, z: Any, delta_bias: Any, delta_softplus: bool) -> dict[str, Any]:
    return {
        "has_D": D is not None,
        "has_z": z is not None,
        "has_delta_bias": delta_bias is not None,
        "delta_softplus": delta_softplus,
    }


def _flops(u: Any, delta: Any, A: Any, B: Any, C: Any, *options: Any) -> int:
    return selective_scan_flops(u[0], u[1], u[2], A[1], **_options(*options))


def _paper_flops(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *args: Any) -> int:
    options = {"has_D": D is not None, "has_z": z is not None}
    return 2 * selective_scan_flops(u[0], u[1], u[2], A[1], **options, convention="paper")


def _backward_flops(dout: Any, dlast: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, *options: Any) -> int:
    return selective_scan_bwd_flops(u[0], u[1], u[2], A[1], **_options(*options))


_call = register(
    OPERATOR,
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus",
    ("out", "last_state"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    paper_flops=_paper_flops,
    # u, B, C and z stay as they come: widening u and z would double their memory
    autocast_wide=("delta", "A", "D", "delta_bias"),
)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **optional: Tensor | None) -> None:
    if u.ndim != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (B, D, L)")
    batch, dim, seqlen = u.shape
    if A.ndim != 2 or A.shape[0] != dim:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (D, N) = ({dim}, N)")
    dstate = A.shape[1]
    for name, x in (("delta", delta), ("z", optional["z"])):
        if x is not None and x.shape != u.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of u, {tuple(u.shape)}")
    for name in ("D", "delta_bias"):
        x = optional[name]
        if x is not None and x.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (D,) = ({dim},)")
    for name, x in (("B", B), ("C", C)):
        forms = {2: (dim, dstate), 3: (batch, dstate, seqlen)}
        fits = x.shape == forms[x.ndim] if x.ndim in forms else x.ndim == 4
        if x.ndim == 4:
            groups = x.shape[1]
            fits = groups > 0 and dim % groups == 0 and x.shape == (batch, groups, dstate, seqlen)
        if not fits:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected (B, N, L) = ({batch}, {dstate}, {seqlen}), "
                f"(B, G, N, L) with G a divisor of {dim}, or (D, N) = ({dim}, {dstate})"
            )
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), *optional.items()):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, expected a floating-point dtype")
        if x is not None and x.device != u.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of u, {u.device}")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's selective scan: a linear recurrence over the tokens whose step, B and C depend on the token.

    delta = softplus(delta + delta_bias);  h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, from h_0 = 0;
    y_t = sum_n C_t h_t + D u_t;  out = y silu(z). Bias, softplus, D and z are optional.

    The state is float32 for inputs of at most 32 bits and float64 for float64 inputs, whatever autocast says. Every
    input has a gradient, also through the last state; second derivatives are refused. Non-contiguous inputs are
    read as they are.

    Args:
        u: input, (B, D, L), float32, float64, bfloat16 or float16.
        delta: step size before bias and softplus, (B, D, L).
        A: rates of the states, (D, N), real; negative where states decay. A complex A runs in torch operations, with B
            and C in the form that `complex.py` describes.
        B: how the input enters the state: (B, N, L) shared by all channels, (B, G, N, L) with channel d in group
            d // (D / G), or constant (D, N).
        C: how the state is read, in any of the forms of B.
        D: skip weight, (D,).
        z: gate before silu, (B, D, L).
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to delta.
        return_last_state: return the state after the last token too.

    Returns:
        out, (B, D, L), contiguous, dtype of u; with `return_last_state` also the state, (B, D, N), float32 or float64.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names the argument, its value and what was
            expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Mamba (arXiv 2312.00752), Algorithm 2; state-spaces/mamba, selective_scan_ref.
    """
    if A.is_complex():
        if forced_backend() not in (None, "reference"):
            raise BackendError(
                f"backend {forced_backend()!r} was asked for but takes no complex A ({A.dtype})"
            )
        out, last_state = complex_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last_state) if return_last_state else out
    _check(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias)
    if exporting():
        from vitzoo.kernels.selective_scan.onnx import selective_scan_export

        out, last_state = selective_scan_export(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        out, last_state = _call(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last_state) if return_last_state else out
