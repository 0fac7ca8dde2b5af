"""The operators vitzoo::selective_scan and vitzoo::selective_scan_bwd, and the public function.

One implementation serves every device and picks the backend at run time, inside the operator, so that compiled graphs
stay whole. Under torch.export the function takes another path, see onnx.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitzoo.kernels.common.backends import Backend, BackendError, Operator, forced_backend, use_backend
from vitzoo.kernels.selective_scan import cpu
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
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": selective_scan_reference, "backward": selective_scan_reference_bwd},
            lambda *args: None,
        ),
    ),
)

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)
_LIBRARY = torch.library.Library("vitzoo", "FRAGMENT")
_LIBRARY.define(f"selective_scan({_INPUTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
# The gradient of an absent input is an empty tensor.
_LIBRARY.define(
    f"selective_scan_bwd(Tensor? dout, Tensor? dlast, {_INPUTS}) -> ({', '.join(['Tensor'] * 8)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format), _zero_state(u, args[1])
    out, last_state = OPERATOR.choose(u, *args).run["forward"](u, *args)
    return out.contiguous(), last_state.contiguous()


def _zero_state(u: Tensor, A: Tensor) -> Tensor:
    return u.new_zeros((u.shape[0], u.shape[1], A.shape[1]), dtype=compute_dtype(u))


def _backward(dout: Tensor | None, dlast: Tensor | None, u: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = (u, *args[:-1])
    if u.numel() == 0:
        return tuple(
            u.new_empty(0) if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            for x in inputs
        )
    if dout is None:
        dout = torch.zeros_like(u)
    gradients = OPERATOR.choose(u, *args).run["backward"](dout, dlast, u, *args)
    return tuple(
        u.new_empty(0) if x is None else gradient.to(x.dtype).contiguous()
        for x, gradient in zip(inputs, gradients, strict=True)
    )


def _forward_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    torch._check(u.ndim == 3, lambda: f"u has {u.ndim} axes, expected (B, D, L)")
    torch._check(
        delta.shape == u.shape, lambda: f"delta is {tuple(delta.shape)}, expected u's {tuple(u.shape)}"
    )
    torch._check(
        A.ndim == 2 and A.shape[0] == u.shape[1], lambda: f"A is {tuple(A.shape)}, expected ({u.shape[1]}, N)"
    )
    torch._check(not A.is_complex(), lambda: f"A is {A.dtype}; only real A is supported")
    for name, matrix in (("B", B), ("C", C)):
        message = f"{name} has {matrix.ndim} axes, expected 2, 3 or 4"
        torch._check(2 <= matrix.ndim <= 4, functools.partial(str, message))
    return u.new_empty(u.shape), u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=compute_dtype(u))


def _backward_fake(dout: Tensor | None, dlast: Tensor | None, u: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, *args[:-1]))


_LIBRARY.impl("selective_scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("selective_scan_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vitzoo::selective_scan", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("vitzoo::selective_scan_bwd", _backward_fake, lib=_LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])
    ctx.delta_softplus = inputs[-1]
    ctx.backend = forced_backend()  # the engine may run the backward pass in a thread of its own


def _differentiate(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if dout is None and dlast is None:
        return (*(None for _ in inputs), None)
    with use_backend(ctx.backend or forced_backend()):
        gradients = torch.ops.vitzoo.selective_scan_bwd(dout, dlast, *inputs, ctx.delta_softplus)
    return (*(None if x is None else g for x, g in zip(inputs, gradients, strict=True)), None)


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "selective_scan can be differentiated once only; its backward pass has no gradient of its own"
    )


torch.library.register_autograd("vitzoo::selective_scan", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("vitzoo::selective_scan_bwd", _no_double_backward, lib=_LIBRARY)


def _register_autocast(key: str) -> None:
    """Under autocast keep delta, A, D and delta_bias at least float32; u, B, C and z stay as they come.

    torch.library.register_autocast casts every input to one dtype, which would double the memory of u and z.
    """
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.vitzoo.selective_scan(
                u, wide(delta), wide(A), B, C, wide(D), z, wide(delta_bias), delta_softplus
            )

    _LIBRARY.impl("selective_scan", autocast, key)


_register_autocast("AutocastCPU")
_register_autocast("AutocastCUDA")


def _sizes(u_shape: Any, A_shape: Any) -> tuple[int, int, int, int]:
    return (*u_shape, A_shape[1])


@register_flop_formula(torch.ops.vitzoo.selective_scan)
def _flops(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    **kwargs: Any,
) -> int:
    return selective_scan_flops(
        *_sizes(u, A),
        has_D=D is not None,
        has_z=z is not None,
        has_delta_bias=delta_bias is not None,
        delta_softplus=delta_softplus,
    )


@register_flop_formula(torch.ops.vitzoo.selective_scan_bwd)
def _bwd_flops(
    dout: Any, dlast: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *args: Any, **kw: Any
) -> int:
    delta_bias, delta_softplus = args
    return selective_scan_bwd_flops(
        *_sizes(u, A),
        has_D=D is not None,
        has_z=z is not None,
        has_delta_bias=delta_bias is not None,
        delta_softplus=delta_softplus,
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
    # torch 2.11 answers yes to is_exporting() under torch.compile too, where the operator itself belongs
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        from vitzoo.kernels.selective_scan.onnx import selective_scan_export

        out, last_state = selective_scan_export(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        out, last_state = torch.ops.vitzoo.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last_state) if return_last_state else out
