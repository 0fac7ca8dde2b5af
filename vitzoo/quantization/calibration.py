"""Finds scales and zero points from data: extremes, percentiles, least squared error, power-of-two factors.

The methods differ in what they divide by and when they round; each function follows its source to the last step, since
a code on the other side of a tie is another network. Errors are means of squares in float32, in the order given, and
the first of equal errors wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vitzoo.quantization.quantizers import LogSqrt2, Quantizer, Uniform

Q = TypeVar("Q", bound=Quantizer)
PERCENTILES = (0.999, 0.9999, 0.99999)
_COMPARED = 1 << 16  # values that candidates for a range are compared on
_SMALLEST = torch.finfo(torch.float32).eps  # the least scale FQ-ViT allows


def check_bits(bits: int) -> None:
    """Raise ValueError unless 2 <= bits <= 16."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits is {bits}, expected 2 to 16")


def _quantile(rows: Tensor, q: float) -> Tensor:
    """Return the quantile of each row, linearly interpolated; torch.quantile refuses rows above 16M elements."""
    if rows.shape[-1] <= 1 << 24:
        return torch.quantile(rows, q, dim=-1)
    at = q * (rows.shape[-1] - 1)
    low = int(at)
    found = torch.stack([rows.kthvalue(k, dim=-1).values for k in (low + 1, min(low + 2, rows.shape[-1]))])
    return torch.lerp(found[0], found[1], at - low)


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """Return x as (channels, elements); one row where axis is None."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _shaped(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return one value a row in a shape that broadcasts against x."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def fit_percentile(
    x: Tensor, bits: int, axis: int | None = None, percentiles: tuple[float, ...] = PERCENTILES
) -> Uniform:
    """Fit an affine quantizer between the two percentiles (p, 1 - p) of least squared error.

    Args:
        x: calibration data, any shape.
        bits: width; codes are 0 ... 2^bits - 1, also for weights. The zero point may lie outside them.
        axis: the channel axis; None fits one scale for the tensor.
        percentiles: candidates for p.

    Raises:
        ValueError: bits outside 2 to 16.

    Source: RepQ-ViT (arXiv 2212.08254), zkkli/RepQ-ViT a160561b, UniformQuantizer.
    """
    check_bits(bits)
    rows, top = _rows(x, axis), 2**bits - 1
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for p in percentiles:
        high, low = _quantile(rows, p), _quantile(rows, 1 - p)
        scale = ((high - low) / top).clamp_min(_SMALLEST)  # a channel of equal values has no range
        zero = torch.round(-low / scale)
        error = (rows - Uniform(scale[:, None], zero[:, None], 0, top)(rows)).abs().pow(2).mean(1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            pairs = zip((error, scale, zero), best, strict=True)
            best = tuple(torch.where(better, new, old) for new, old in pairs)  # type: ignore[assignment]
    assert best is not None
    return Uniform(_shaped(best[1], x, axis), _shaped(best[2], x, axis), 0, top)


def fit_log_sqrt2(x: Tensor, bits: int, percentiles: tuple[float, ...] = PERCENTILES) -> LogSqrt2:
    """Fit RepQ-ViT's quantizer of attention probabilities: delta is the percentile of least squared error.

    Args:
        x: probabilities, any shape.
        bits: width.
        percentiles: candidates.

    Raises:
        ValueError: bits outside 2 to 16.
    """
    check_bits(bits)
    candidates = [LogSqrt2(_quantile(x.reshape(1, -1), p).reshape(()), bits) for p in percentiles]
    return least_error(x, candidates)


def symmetric(bound: Tensor, bits: int, divisor: float | None = None) -> Uniform:
    """Return the signed quantizer with zero point 0 that reaches `bound`.

    Args:
        bound: largest magnitude, a tensor that broadcasts against the data.
        bits: width; codes are -2^(bits-1) ... 2^(bits-1) - 1.
        divisor: scale = bound / divisor; default 2^(bits-1) - 1, what runtimes use. FQ-ViT takes 2^(bits-1) - 0.5.

    Raises:
        ValueError: bits outside 2 to 16.
    """
    check_bits(bits)
    half = 2 ** (bits - 1)
    scale = (bound / (divisor or half - 1)).clamp_min(_SMALLEST)
    return Uniform(scale, torch.zeros_like(scale), -half, half - 1)


def affine(low: Tensor, high: Tensor, bits: int) -> Uniform:
    """Return FQ-ViT's unsigned quantizer between two extremes; zero is not forced into the range.

    Args:
        low: smallest value.
        high: largest value.
        bits: width; codes are 0 ... 2^bits - 1.
    """
    check_bits(bits)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp_min(_SMALLEST)
    return Uniform(scale, (0 - torch.round(low / scale)).clamp(0, top), 0, top, shift_first=True)


def fit_minmax(x: Tensor, bits: int, signed: bool = False, axis: int | None = None) -> Uniform:
    """Fit a quantizer to the extremes of x.

    Args:
        x: calibration data or a weight.
        bits: width.
        signed: symmetric around zero, scale max|x| / (2^(bits-1) - 0.5), instead of affine.
        axis: the channel axis; None fits one scale for the tensor.

    Source: FQ-ViT (arXiv 2111.13824), megvii-research/FQ-ViT 5daf5915.
    """
    rows = _rows(x, axis)
    if signed:
        bound = _shaped(rows.abs().amax(1), x, axis)
        found = symmetric(bound, bits, 2 ** (bits - 1) - 0.5)
        return Uniform(found.scale, found.zero_point, found.qmin, found.qmax, shift_first=True)
    return affine(_shaped(rows.amin(1), x, axis), _shaped(rows.amax(1), x, axis), bits)


def fit_ema(batches: Iterable[Tensor], bits: int, factor: float = 0.01) -> Uniform:
    """Fit an affine quantizer to a running mean of the extremes over batches.

    Args:
        batches: calibration data, the channel last.
        bits: width.
        factor: weight of a new batch.
    """
    low = high = None
    for x in batches:
        rows = x.flatten(0, -2)
        new_low, new_high = rows.amin(0), rows.amax(0)
        # the running value is that of the tensor, against the channels of the new batch
        low = new_low if low is None else low + factor * (new_low - low)
        high = new_high if high is None else high + factor * (new_high - high)
        low, high = low.min(), high.max()
    if low is None or high is None:
        raise ValueError("no batch to calibrate with")
    return affine(low, high, bits)


def fit_running_percentile(
    batches: Iterable[Tensor], bits: int, percentile: float = 0.99999, factor: float = 0.01
) -> Uniform:
    """Fit an affine quantizer to a running mean of the extreme percentiles over batches.

    Args:
        batches: calibration data.
        bits: width.
        percentile: of the upper end; the lower end is 1 - percentile.
        factor: weight of a new batch.
    """
    low = high = None
    for x in batches:
        flat = x.reshape(1, -1)
        new_low, new_high = _quantile(flat, 1 - percentile)[0], _quantile(flat, percentile)[0]
        low = new_low if low is None else low + factor * (new_low - low)
        high = new_high if high is None else high + factor * (new_high - high)
    if low is None or high is None:
        raise ValueError("no batch to calibrate with")
    return affine(low, high, bits)


def fit_range(
    x: Tensor,
    bits: int,
    shrink: bool = True,
    steps: int = 50,
    extremes: tuple[float, float] | None = None,
    centred: bool = False,
    symmetric: bool = False,
) -> Uniform:
    """Fit the affine quantizer that runtimes execute: unsigned codes, a whole zero point among them, zero in range.

    Args:
        x: calibration data; more than `_COMPARED` values are thinned evenly to compare candidates.
        bits: width; codes are 0 ... 2^bits - 1.
        shrink: take the extremes times 1 - 0.01 i, i < steps, of least squared error, instead of the extremes.
        steps: see `shrink`.
        extremes: least and greatest value where x is a sample of what was seen; its own if None.
        centred: put the zero point in the middle, 2^(bits - 1), where there are negative values.
        symmetric: put it there always.
    """
    check_bits(bits)
    top = 2**bits - 1
    ends = (x.min(), x.max()) if extremes is None else x.new_tensor(extremes).unbind()
    low, high = ends[0].clamp_max(0), ends[1].clamp_min(0)
    half = 2 ** (bits - 1)
    middle = symmetric or (centred and float(low) < 0)
    if middle:
        bound = torch.maximum(-low, high)
        low, high = -bound * half / (half - 1), bound

    def between(factor: float) -> Uniform:
        scale = ((high - low) * factor / top).clamp_min(_SMALLEST)
        zero_point = (
            torch.full_like(scale, half) if middle else torch.round(-low * factor / scale).clamp(0, top)
        )
        return Uniform(scale, zero_point, 0, top)

    if not shrink:
        return between(1.0)
    values = x.flatten()
    values = values[:: -(-len(values) // _COMPARED)]
    return least_error(values, [between(1 - 0.01 * i) for i in range(steps)])


def least_error(x: Tensor, candidates: Sequence[Q]) -> Q:
    """Return the quantizer of least squared error on x, the first of equals."""
    errors = [float((x - quantizer(x)).square().mean()) for quantizer in candidates]
    return candidates[errors.index(min(errors))]


def fit_omse(x: Tensor, bits: int, steps: int = 90) -> Uniform:
    """Fit an affine quantizer by shrinking both extremes together to the least squared error.

    Args:
        x: calibration data.
        bits: width.
        steps: candidates, each one hundredth narrower.
    """
    low, high = x.min(), x.max()
    candidates = [affine(low * (1 - 0.01 * i), high * (1 - 0.01 * i), bits) for i in range(steps)]
    return least_error(x, candidates)


def fit_power_of_two_factors(x: Tensor, bits: int, factors: int = 4) -> Uniform:
    """Fit one scale and zero point for the tensor and a factor 1, 2, 4 or 8 for each channel (the last axis).

    Args:
        x: calibration data, the input of a LayerNorm.
        bits: width.
        factors: how many powers of two.

    Source: FQ-ViT (arXiv 2111.13824), section 3.2, Power-of-Two Factor.
    """
    whole = affine(x.min(), x.max(), bits)
    scales = [whole.scale / 2**k for k in reversed(range(factors))]
    rows = x.flatten(0, -2)
    errors = torch.stack(
        [
            (rows - Uniform(s, whole.zero_point, whole.qmin, whole.qmax, True)(rows)).abs().pow(2).mean(0)
            for s in scales
        ]
    )
    chosen = torch.stack(scales)[errors.argmin(0)]
    return Uniform(chosen, whole.zero_point, whole.qmin, whole.qmax, shift_first=True)
