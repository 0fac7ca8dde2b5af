"""The operators vitzoo::reorganize_tokens and vitzoo::reorganize_tokens_bwd, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import triton_support
from vitzoo.kernels.common.backends import Backend, Operator
from vitzoo.kernels.common.registration import backward_by_autograd, exporting, register
from vitzoo.kernels.reorganize_tokens import cpu
from vitzoo.kernels.reorganize_tokens.reference import gather_and_fuse, reorganize_tokens_reference


def _reference_backward(
    dtokens: Tensor, indices: Tensor, x: Tensor, scores: Tensor, keep: int, fuse: bool
) -> tuple[Tensor | None, ...]:
    return backward_by_autograd(gather_and_fuse, (x, scores, indices, fuse), (dtokens,), (0, 1))


OPERATOR = Operator(
    "reorganize_tokens",
    backends=(
        triton_support.backend("reorganize_tokens", triton_support.narrow_why_not("x")),
        Backend("cpu", {"forward": cpu.forward, "backward": cpu.backward}, cpu.why_not),
        Backend(
            "reference",
            {"forward": reorganize_tokens_reference, "backward": _reference_backward},
            lambda *args: None,
        ),
    ),
)


def _fake(x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    return (
        x.new_empty((batch, cpu.token_count(length, keep, fuse), channels)),
        x.new_empty((batch, keep), dtype=torch.int64),
    )


def _flops(x: Any, scores: Any, keep: int, fuse: bool) -> int:
    return 2 * x[0] * (x[1] - 1 - keep) * x[2] if fuse else 0


def _backward_flops(dtokens: Any, indices: Any, *inputs: Any) -> int:
    return 2 * _flops(*inputs)


_call = register(
    OPERATOR,
    "Tensor x, Tensor scores, SymInt keep, bool fuse",
    ("tokens", "indices"),
    fake=_fake,
    flops=_flops,
    backward_flops=_backward_flops,
    saved=("indices",),
    no_gradient=("indices",),
    autocast_wide=("scores",),
)


def _check(x: Tensor, scores: Tensor, keep: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, L, C)")
    if scores.ndim != 2 or scores.shape[0] != x.shape[0]:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected (B, L - 1) with B {x.shape[0]}")
    count = x.shape[1] - 1
    if scores.shape[1] != count:
        raise ValueError(
            f"scores have {scores.shape[1]} entries, {count} tokens besides the class token need {count}"
        )
    if not 1 <= keep <= count:
        raise ValueError(f"keep {keep} is not in 1 .. {count}, the number of tokens besides the class token")
    for name, value in (("x", x), ("scores", scores)):
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, expected a floating-point dtype")
    if scores.device != x.device:
        raise ValueError(f"scores are on {scores.device}, expected the device of x, {x.device}")


def reorganize_tokens(x: Tensor, scores: Tensor, keep: int, fuse: bool = False) -> tuple[Tensor, Tensor]:
    """Keep the class token and the tokens with the highest scores, in one pass over the tokens.

    Among equal scores the token of lower index comes first, and NaN counts as the highest. x and, through the fused
    token, the scores have gradients; second derivatives are refused.

    Args:
        x: tokens, (B, L, C), class token first, float32, float64, bfloat16 or float16.
        scores: one for each token but the class token, (B, L - 1).
        keep: K, how many to keep besides the class token.
        fuse: append the sum over the dropped tokens of score * token, if any was dropped, summed in float32 or wider.
            The scores are not normalised, so this token is small.

    Returns:
        The tokens, (B, 1 + K, C) or with the fused one (B, 2 + K, C): class token, kept tokens by falling score,
        fused token. And which were kept, (B, K), int64, counted without the class token.

    Raises:
        ValueError: `keep` is not in 1 .. L - 1, or shape, dtype or device of an input does not fit; the message names
            the argument, its value and what was expected.
        BackendError: the backend forced by `use_backend` cannot take the call.

    Source: Liang et al., EViT, arXiv 2202.07800, section 3.2, equation 4.
    """
    _check(x, scores, keep)
    if exporting():
        index = scores.topk(keep, dim=1).indices  # ONNX's TopK puts the lower of equal scores first
        return gather_and_fuse(x, scores, index, fuse), index
    tokens, indices = _call(x, scores, keep, fuse)
    return tokens, indices
