"""What a number becomes at a few bits: uniform, logarithmic and twin quantizers.

Each quantizer is a frozen set of parameters with three methods: `codes(x)`, the integers that a device would hold,
`dequantize(codes)`, and the call, which does both ("fake quantization"). Codes are float tensors of whole numbers.
Rounding is to the nearest, ties to even. How parameters are found is in `calibration.py` and `search.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

# The deepest point of GELU: what a twin quantizer's negative range has to hold.
GELU_MINIMUM = -0.16997124254703522


class Quantizer(ABC):
    """What turns a float tensor into codes and back."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x, whole numbers in x's dtype."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x as its codes hold it."""
        return self.dequantize(self.codes(x))


@dataclass(frozen=True)
class Uniform(Quantizer):
    """x ~ scale (q - zero_point) with q in [qmin, qmax].

    Attributes:
        scale: step, a tensor that broadcasts against x.
        zero_point: code of zero, broadcasts likewise; RepQ-ViT leaves a fraction after its reparameterization.
        qmin: lowest code.
        qmax: highest code.
        shift_first: add the zero point before rounding (FQ-ViT) instead of after it (ONNX, RepQ-ViT); the two differ at
            ties, or where the zero point is not whole.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    shift_first: bool = False

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x."""
        scaled = x / self.scale
        shifted = (
            torch.round(scaled + self.zero_point)
            if self.shift_first
            else torch.round(scaled) + self.zero_point
        )
        return shifted.clamp(self.qmin, self.qmax)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return (codes - self.zero_point) * self.scale


@dataclass(frozen=True)
class LogSqrt2(Quantizer):
    """x ~ delta sqrt(2)^-q for x >= 0: RepQ-ViT's quantizer of attention probabilities.

    Values below the smallest power become zero, values above delta saturate at delta.

    Attributes:
        delta: the value of code 0.
        bits: width; 2^bits powers and zero. A device that has to spend a code on zero loses the smallest power.

    Source: RepQ-ViT (arXiv 2212.08254), section 3.3.
    """

    delta: Tensor
    bits: int

    def codes(self, x: Tensor) -> Tensor:
        """Return q; 2^bits stands for zero."""
        q = torch.round(-2 * torch.log2(x / self.delta))
        return q.clamp(0, 2**self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        odd = codes % 2 == 1
        power = torch.pow(2.0, -torch.ceil(codes / 2)) * torch.where(odd, math.sqrt(2.0), 1.0)
        return torch.where(codes >= 2**self.bits, 0.0, power * self.delta)


@dataclass(frozen=True)
class Log2(Quantizer):
    """x ~ 2^-q for x in [0, 1]: FQ-ViT's quantizer of attention probabilities, without a scale.

    Attributes:
        bits: width; 2^bits powers and zero.

    Source: FQ-ViT (arXiv 2111.13824), section 3.3.
    """

    bits: int

    def codes(self, x: Tensor) -> Tensor:
        """Return q; 2^bits stands for zero."""
        return torch.round(-torch.log2(x)).clamp(0, 2**self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return torch.where(codes >= 2**self.bits, 0.0, torch.pow(2.0, -codes))


@dataclass(frozen=True)
class TwinSoftmax(Quantizer):
    """Two uniform ranges for attention probabilities: [0, split] finely and [split, 1] coarsely, one bit to choose.

    Attributes:
        split: where the ranges meet, a power of two.
        bits: width.
        compat: add both branches, as the authors' code does, where the paper selects one: every entry then carries
            about `split` in addition. For comparison with their figures only.

    Source: PTQ4ViT (arXiv 2111.12293), section 3.2.
    """

    split: float
    bits: int
    compat: bool = False

    @property
    def levels(self) -> int:
        """Return the codes of each range."""
        return 2 ** (self.bits - 1)

    def codes(self, x: Tensor) -> Tensor:
        """Return q, plus `levels` in the coarse range."""
        top = self.levels - 1
        fine = torch.round(x.clamp(0, self.split) / (self.split / top)).clamp(0, top)
        coarse = torch.round(x.clamp(self.split, 1) * top).clamp(0, top)
        return torch.where(x >= self.split, coarse + self.levels, fine)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        top = self.levels - 1
        return torch.where(codes >= self.levels, (codes - self.levels) / top, codes * (self.split / top))

    def __call__(self, x: Tensor) -> Tensor:
        """Return x as its codes hold it, or the sum of both branches."""
        if not self.compat:
            return super().__call__(x)
        top = self.levels - 1
        coarse, fine = 1 / top, self.split / top
        high = torch.round(x.clamp(self.split, 1) / coarse).clamp(0, top) * coarse
        return high + torch.round(x.clamp(0, self.split) / fine).clamp(0, top) * fine


@dataclass(frozen=True)
class TwinGelu(Quantizer):
    """Two uniform ranges for GELU's output: a fixed one for its negative lobe and a searched one above zero.

    Attributes:
        step: of the positive range.
        bits: width.

    Source: PTQ4ViT (arXiv 2111.12293), section 3.2.
    """

    step: Tensor
    bits: int

    @property
    def levels(self) -> int:
        """Return the codes of each range."""
        return 2 ** (self.bits - 1)

    @property
    def negative_step(self) -> float:
        """Return the step of the negative range."""
        return -GELU_MINIMUM / self.levels

    def codes(self, x: Tensor) -> Tensor:
        """Return q in [-levels, levels - 1]; its sign names the range."""
        positive = torch.round(x / self.step).clamp(0, self.levels - 1)
        return torch.where(x >= 0, positive, torch.round(x / self.negative_step).clamp(-self.levels, 0))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return torch.where(codes >= 0, codes * self.step, codes * self.negative_step)
