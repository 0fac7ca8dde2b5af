"""Linear layer of 8-bit codes: int8 weight, 8-bit activations, 32-bit sums."""

from vitzoo.kernels.int8_linear.op import int8_linear

__all__ = ["int8_linear"]
