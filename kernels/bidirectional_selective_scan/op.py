"""The operators vitzoo::bidirectional_selective_scan and its backward pass, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.bidirectional_selective_scan import cpu
from vitzoo.kernels.bidirectional_selective_scan.flops import (
    bidirectional_selective_scan_bwd_flops,
    bidirectional_selective_scan_flops,
)
from vitzoo.kernels.bidirectional_selective_scan.reference import bidirectional_selective_scan_reference
from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register


def _reference_bwd(dout: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(bidirectional_selective_scan_reference, inputs, (dout,), tuple(range(15)))


OPERATOR = Operator(
    "bidirectional_selective_scan",
    backends=(
        triton_support.backend("bidirectional_selective_scan", triton_support.narrow_why_not("u")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": bidirectional_selective_scan_reference, "backward": _reference_bwd},
            lambda *args: None,
        ),
    ),
)


def _options(z: Any, D: Any, delta_bias: Any, delta_softplus: bool) -> dict[str, Any]:
    return {
        "has_z": z is not None,
        "has_D": D is not None,
        "has_delta_bias": delta_bias is not None,
        "delta_softplus": delta_softplus,
    }


def _flops(u: Any, z: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, *others: Any) -> int:
    return bidirectional_selective_scan_flops(
        u[0], u[1], u[2], A[1], **_options(z, D, delta_bias, others[-1])
    )


def _paper_flops(
    u: Any, z: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, *others: Any
) -> int:
    options = {"has_D": D is not None, "has_z": z is not None}
    return 2 * bidirectional_selective_scan_flops(u[0], u[1], u[2], A[1], **options, convention="paper")


def _backward_flops(
    dout: Any, u: Any, z: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, *others: Any
) -> int:
    options = _options(z, D, delta_bias, others[-1])
    return bidirectional_selective_scan_bwd_flops(
        u[0], u[1], u[2], A[1], has_u_b=others[-2] is not None, **options
    )


_call = register(
    OPERATOR,
    "Tensor u, Tensor? z, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, Tensor? D_b, Tensor? delta_bias_b, Tensor? u_b, "
    "bool delta_softplus",
    ("out",),
    fake=lambda u, *args: u.new_empty(u.shape),
    flops=_flops,
    backward_flops=_backward_flops,
    paper_flops=_paper_flops,
    autocast_wide=("delta", "A", "D", "delta_bias", "delta_b", "A_b", "D_b", "delta_bias_b"),
)


def _check_shape(name: str, x: Tensor | None, expected: tuple[int, ...], letters: str) -> None:
    if x is not None and x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {letters} = {expected}")


def _check_matrix(name: str, x: Tensor, batch: int, dim: int, dstate: int, seqlen: int) -> None:
    fits = x.shape in ((dim, dstate), (batch, dstate, seqlen))
    if x.ndim == 4:
        groups = x.shape[1]
        fits = groups > 0 and dim % groups == 0 and x.shape == (batch, groups, dstate, seqlen)
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (B, N, L) = ({batch}, {dstate}, {seqlen}), "
            f"(B, G, N, L) with G a divisor of {dim}, or (D, N) = ({dim}, {dstate})"
        )


def _check(
    u: Tensor, z: Tensor | None, u_b: Tensor | None, ahead: dict[str, Any], back: dict[str, Any]
) -> None:
    if u.ndim != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (B, D, L)")
    batch, dim, seqlen = u.shape
    A = ahead["A"]
    if A.ndim != 2 or A.shape[0] != dim:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected (D, N) = ({dim}, N)")
    for name, x in (("z", z), ("u_b", u_b), ("delta", ahead["delta"])):
        _check_shape(name, x, (batch, dim, seqlen), "(B, D, L)")
    for name in ("D", "delta_bias"):
        _check_shape(name, ahead[name], (dim,), "(D,)")
    for name in ("B", "C"):
        _check_matrix(name, ahead[name], batch, dim, A.shape[1], seqlen)
    for name, x in ahead.items():
        other = back[name]
        if (x is None) != (other is None):
            given, missing = (name, f"{name}_b") if other is None else (f"{name}_b", name)
            raise ValueError(f"{given} is given and {missing} is None, expected both or neither")
        if x is not None and other.shape != x.shape:
            raise ValueError(
                f"{name}_b has shape {tuple(other.shape)}, expected that of {name}, {tuple(x.shape)}"
            )
    tensors = {"u": u, "z": z, "u_b": u_b} | ahead | {f"{name}_b": x for name, x in back.items()}
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, expected a real floating-point dtype")
        if x is not None and x.device != u.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of u, {u.device}")


def bidirectional_selective_scan(
    u: Tensor,
    z: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    u_b: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run two selective scans over the same tokens, one from each end, and gate their sum.

    out = (scan(u; delta, A, B, C, D, delta_bias) + back(u_b; delta_b, A_b, B_b, C_b, D_b, delta_bias_b)) silu(z), where
    back goes from the last token to the first. Everything is in the order of the tokens, also what belongs to `back`:
    nothing is flipped, by caller or kernel. The state is float32 for inputs of at most 32 bits and float64 for float64
    inputs. Every tensor has a gradient; second derivatives are refused.

    Vim halves the sum: multiply what its linear output projection gives by 0.5.

    Args:
        u: input, (B, D, L), float32, float64, bfloat16 or float16; any strides, as every argument of this shape.
        z: gate before silu, (B, D, L), or None; it is the same for both directions.
        delta: step size before bias and softplus, (B, D, L).
        A: rates of the states, (D, N), real; negative where states decay.
        B: how the input enters the state: (B, N, L) shared by all channels, (B, G, N, L) with channel d in group
            d // (D / G), or constant (D, N).
        C: how the state is read, in any of the forms of B.
        D: skip weight, (D,), or None.
        delta_bias: added to delta, (D,), or None.
        delta_b: as delta, for the direction from the last token to the first.
        A_b: as A, for that direction.
        B_b: as B, of its shape.
        C_b: as C, of its shape.
        D_b: as D; None exactly when D is.
        delta_bias_b: as delta_bias; None exactly when delta_bias is.
        u_b: input of that direction, (B, D, L), in the order of the tokens (Vim convolves each direction by itself);
            None if both read u.
        delta_softplus: apply softplus to the steps of both.

    Returns:
        out, (B, D, L), contiguous, dtype of u.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names the argument, its value and what was
            expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Vim, arXiv 2401.09417, Algorithm 1; hustvl/Vim at dd0358ad, mamba_inner_fn_no_out_proj.
    """
    ahead = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    back = {"delta": delta_b, "A": A_b, "B": B_b, "C": C_b, "D": D_b, "delta_bias": delta_bias_b}
    _check(u, z, u_b, ahead, back)
    inputs: tuple[Any, ...] = (u, z, *ahead.values(), *back.values(), u_b, delta_softplus)
    if exporting("bidirectional_selective_scan"):
        from vitzoo.kernels.bidirectional_selective_scan.onnx import bidirectional_selective_scan_export

        return bidirectional_selective_scan_export(*inputs)
    return _call(*inputs)
