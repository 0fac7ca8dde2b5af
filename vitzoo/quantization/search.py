"""PTQ4ViT's search: intervals of the two operands of a product, tried in turn against the product's exact output.

Candidates are fractions of the interval that reaches the largest value. A candidate's score is the cosine of exact and
quantized output over the features, their negated squared difference, or that difference weighted by the gradient of the
loss at the output, a diagonal of the Hessian.

Source: PTQ4ViT (arXiv 2111.12293), sections 3.2 and 3.3; hahnyuan/PTQ4ViT b42c790c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.quantization.calibration import check_bits
from vitzoo.quantization.quantizers import TwinGelu, TwinSoftmax, Uniform

METRICS = ("cosine", "l2", "hessian")
SPLITS = tuple(2.0**-i for i in range(20))


@dataclass(frozen=True)
class SearchSettings:
    """How a search goes.

    Attributes:
        metric: one of `METRICS`.
        rounds: how often the two operands are searched in turn.
        low: the first candidate, a fraction of the interval that reaches the largest value.
        high: the end of the candidates, not tried itself.
        candidates: how many.

    Raises:
        ValueError: an unknown metric.
    """

    metric: str = "hessian"
    rounds: int = 3
    low: float = 0.01
    high: float = 1.2
    candidates: int = 100

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}, expected one of {', '.join(METRICS)}")

    def of(self, start: Tensor) -> list[Tensor]:
        """Return the candidate intervals, given the one that reaches the largest value."""
        step = (self.high - self.low) / self.candidates
        return [(self.low + i * step) * start for i in range(self.candidates)]


def _symmetric(interval: Tensor, bits: int) -> Uniform:
    half = 2 ** (bits - 1)
    return Uniform(interval, torch.zeros_like(interval), -half, half - 1)


def _start(x: Tensor, bits: int) -> Tensor:
    return x.abs().max() / (2 ** (bits - 1) - 0.5)


def _score(exact: Tensor, out: Tensor, gradient: Tensor | None, metric: str) -> Tensor:
    """Return the score of an output (..., groups, features) for each group; larger is better."""
    if metric == "cosine":
        score = F.cosine_similarity(exact, out, dim=-1)
    elif metric == "l2":
        score = -((exact - out) ** 2).mean(-1)
    else:
        assert gradient is not None
        score = -((gradient * (exact - out)) ** 2).mean(-1)
    return score.flatten(0, -2).mean(0) if score.ndim > 1 else score


def _check(settings: SearchSettings, gradient: Tensor | None, bits: int) -> None:
    check_bits(bits)
    if settings.metric == "hessian" and gradient is None:
        raise ValueError("metric 'hessian' needs the gradient of the loss at the output; none was given")


def search_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    *,
    groups: int = 1,
    gradient: Tensor | None = None,
    after_gelu: bool = False,
    settings: SearchSettings | None = None,
) -> tuple[Uniform | TwinGelu, Uniform]:
    """Find the quantizers of a linear layer's input and weight.

    Args:
        x: inputs, (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        bits: width of both.
        groups: groups of rows with an interval each, 3 for qkv.
        gradient: of the loss at the layer's output, for the metric "hessian".
        after_gelu: fit the twin quantizer of GELU's output.
        settings: see `SearchSettings`.

    Returns:
        the input's quantizer, one interval; the weight's, (out_features, 1) with one interval a group.

    Raises:
        ValueError: groups that do not divide the rows, no gradient for "hessian", bits outside 2 to 16.
    """
    settings = settings or SearchSettings()
    _check(settings, gradient, bits)
    rows = weight.shape[0]
    if groups < 1 or rows % groups:
        raise ValueError(f"groups is {groups}, not a divisor of the {rows} rows of the weight")

    def grouped(out: Tensor) -> Tensor:
        return out.unflatten(-1, (groups, -1))

    exact = grouped(F.linear(x, weight, bias))
    gradient = None if gradient is None else grouped(gradient)

    def by_row(intervals: Tensor) -> Tensor:
        return intervals.repeat_interleave(rows // groups)[:, None]

    def of_input(interval: Tensor) -> Uniform | TwinGelu:
        return TwinGelu(interval, bits) if after_gelu else _symmetric(interval, bits)

    w_start = torch.stack([_start(part, bits) for part in weight.chunk(groups)])
    a_start = x.max() / (2 ** (bits - 1) - 0.5) if after_gelu else _start(x, bits)
    w_interval, a_interval = w_start, a_start
    for _ in range(settings.rounds):
        x_q = of_input(a_interval)(x)
        tried = settings.of(w_start)
        outs = (grouped(F.linear(x_q, _symmetric(by_row(w), bits)(weight), bias)) for w in tried)
        scores = torch.stack([_score(exact, out, gradient, settings.metric) for out in outs])
        best = scores.argmax(0)
        w_interval = torch.stack(tried)[best, torch.arange(groups, device=best.device)]
        w_q = _symmetric(by_row(w_interval), bits)(weight)
        a_interval = _best(
            settings.of(a_start),
            lambda a, w_q=w_q: grouped(F.linear(of_input(a)(x), w_q, bias)),  # type: ignore[misc]
            lambda out: _score(exact, out, gradient, settings.metric).mean(),
        )
    return of_input(a_interval), _symmetric(by_row(w_interval), bits)


def _best(candidates: list[Any], product: Callable[[Any], Tensor], score: Callable[[Tensor], Tensor]) -> Any:
    scores = torch.stack([score(product(candidate)) for candidate in candidates])
    return candidates[int(scores.argmax())]


def search_softmax_product(
    probs: Tensor,
    v: Tensor,
    bits: int,
    *,
    gradient: Tensor | None = None,
    compat: bool = False,
    settings: SearchSettings | None = None,
) -> tuple[TwinSoftmax, Uniform]:
    """Find the twin quantizer of attention probabilities and the quantizer of v.

    Args:
        probs: attention probabilities, (B, heads, L, L).
        v: values, (B, heads, L, head_dim).
        bits: width of both.
        gradient: of the loss at the product, for the metric "hessian".
        compat: as in `TwinSoftmax`.
        settings: see `SearchSettings`.

    Raises:
        ValueError: no gradient for "hessian", bits outside 2 to 16.
    """
    settings = settings or SearchSettings()
    _check(settings, gradient, bits)
    exact, start = probs @ v, _start(v, bits)
    split, interval = SPLITS[0], start

    def score(out: Tensor) -> Tensor:
        return _score(exact, out, gradient, settings.metric).mean()

    for _ in range(settings.rounds):
        v_q = _symmetric(interval, bits)(v)
        split = _best(
            list(SPLITS),
            lambda s, v_q=v_q: TwinSoftmax(s, bits, compat)(probs) @ v_q,  # type: ignore[misc]
            score,
        )
        probs_q = TwinSoftmax(split, bits, compat)(probs)
        interval = _best(
            settings.of(start),
            lambda i, p=probs_q: p @ _symmetric(i, bits)(v),  # type: ignore[misc]
            score,
        )
    return TwinSoftmax(split, bits, compat), _symmetric(interval, bits)


def search_product(
    a: Tensor,
    b: Tensor,
    bits: int,
    *,
    gradient: Tensor | None = None,
    settings: SearchSettings | None = None,
) -> tuple[Uniform, Uniform]:
    """Find the quantizers of two activations that are multiplied, as q and k^T are.

    Args:
        a: left operand, (..., M, K).
        b: right operand, (..., K, N).
        bits: width of both.
        gradient: of the loss at the product, for the metric "hessian".
        settings: see `SearchSettings`.

    Raises:
        ValueError: no gradient for "hessian", bits outside 2 to 16.
    """
    settings = settings or SearchSettings()
    _check(settings, gradient, bits)
    exact, starts = a @ b, (_start(a, bits), _start(b, bits))
    left, right = starts

    def score(out: Tensor) -> Tensor:
        return _score(exact, out, gradient, settings.metric).mean()

    for _ in range(settings.rounds):
        b_q = _symmetric(right, bits)(b)
        left = _best(settings.of(starts[0]), lambda i, q=b_q: _symmetric(i, bits)(a) @ q, score)  # type: ignore[misc]
        a_q = _symmetric(left, bits)(a)
        right = _best(settings.of(starts[1]), lambda i, q=a_q: q @ _symmetric(i, bits)(b), score)  # type: ignore[misc]
    return _symmetric(left, bits), _symmetric(right, bits)
