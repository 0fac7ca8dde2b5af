"""The operators vitzoo::causal_conv1d and vitzoo::causal_conv1d_bwd, and the public function.

The operator takes x as (B, D, L), or as (B, L, D) with `channels_last`, and returns out in the same order of axes:
outputs and gradients are contiguous in the layout in which x came.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.causal_conv1d import cpu, cuda
from vitzoo.kernels.causal_conv1d.reference import ACTIVATIONS, causal_conv1d_reference
from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register

WIDTHS = (2, 3, 4)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
    reverse: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    x = x.transpose(1, 2) if channels_last else x
    activation = "silu" if silu else None
    out, final_states = causal_conv1d_reference(x, weight, bias, initial_states, activation, reverse)
    return out.transpose(1, 2) if channels_last else out, final_states


def _reference_backward(dout: Tensor, dfinal: Tensor | None, *inputs: Any) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(_reference, inputs, (dout, dfinal), (0, 1, 2, 3))


OPERATOR = Operator(
    "causal_conv1d",
    backends=(
        Backend("cuda", {"forward": cuda.forward, "backward": cuda.backward}, cuda.why_not),
        triton_support.backend("causal_conv1d", triton_support.narrow_why_not("x")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend("reference", {"forward": _reference, "backward": _reference_backward}, lambda *args: None),
    ),
)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[0], weight.shape[1] - 1))


def _flops(x: Any, weight: Any, *args: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[1]


def _backward_flops(
    dout: Any, dfinal: Any, x: Any, weight: Any, bias: Any, initial: Any, silu: bool, *args: Any
) -> int:
    # the gradients of x and of the weight, and with SiLU the convolution once more
    return (2 + silu) * _flops(x, weight)


_call = register(
    OPERATOR,
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, bool silu, bool reverse, bool channels_last",
    ("out", "final_states"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    # x and the states stay as they come: the layer around decides their precision
    autocast_wide=("weight", "bias"),
)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, activation: str | None
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, D, L)")
    batch, dim, _ = x.shape
    if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (D, W) = ({dim}, W) with W 2, 3 or 4"
        )
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (D,) = ({dim},)")
    states = (batch, dim, weight.shape[1] - 1)
    if initial_states is not None and initial_states.shape != states:
        raise ValueError(
            f"initial_states has shape {tuple(initial_states.shape)}, expected (B, D, W - 1) = {tuple(states)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected None, 'silu' or 'swish'")
    for name, value in (("x", x), ("weight", weight), ("bias", bias), ("initial_states", initial_states)):
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of x, {x.device}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel along the tokens, each output seeing its own token and the W - 1 before.

    y_t = bias + sum_k weight_k x_{t - W + 1 + k}; out = silu(y) if there is an activation.

    Products and sums are float32, float64 for float64 inputs. Every input has a gradient, also through the final
    states; second derivatives are refused. Where the channels of x lie side by side in memory, (B, L, D) transposed,
    x is read as it is and out has that layout too; out is contiguous otherwise.

    Args:
        x: input, (B, D, L), float32, float64, bfloat16 or float16.
        weight: (D, W), W 2, 3 or 4; tap W - 1 meets the token itself. Of any floating-point dtype, as bias is.
        bias: (D,).
        initial_states: samples before x, (B, D, W - 1), brought to the dtype of x; zeros if None.
        activation: None, or "silu" (also named "swish").
        return_final_states: return the last W - 1 samples of [initial_states, x] too.
        reverse: walk the tokens from the last to the first, without copying them: the result of flipping x along L,
            convolving, and flipping out. Initial and final states are in the order of that walk.

    Returns:
        out, (B, D, L), dtype of x; with `return_final_states` also the states, (B, D, W - 1), dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown activation; the message names the
            argument, its value and what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Mamba, arXiv 2312.00752, section 3.4; Dao-AILab/causal-conv1d, causal_conv1d_ref (without `reverse`).
    """
    _check(x, weight, bias, initial_states, activation)
    if exporting():
        out, final_states = causal_conv1d_reference(x, weight, bias, initial_states, activation, reverse)
        return (out, final_states) if return_final_states else out
    channels_last = x.shape[2] > 1 and x.stride(2) != 1 and x.stride(1) == 1
    out, final_states = _call(
        x.transpose(1, 2) if channels_last else x,
        weight,
        bias,
        initial_states,
        activation is not None,
        reverse,
        channels_last,
    )
    out = out.transpose(1, 2) if channels_last else out
    return (out, final_states) if return_final_states else out
