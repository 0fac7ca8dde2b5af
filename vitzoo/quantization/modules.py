"""Layers that compute with integers in PyTorch itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.kernels.int8_linear import int8_linear


class Int8Linear(nn.Module):
    """A linear layer on 8-bit codes, by `vitzoo.kernels.int8_linear`; every tensor is a buffer.

    Args:
        weight_int8: symmetric codes of the weight, (O, I), int8.
        weight_scale: scale of each output channel, (O,), float32.
        bias: (O,), float32, or None.
        x_scale: scale of the input's codes, (), float32; None takes max|x| / 127 of each row ("per token").
        x_zero_point: their zero point, (), uint8 or int8, whose dtype is that of the codes.
        activation: None, "gelu" or "relu", applied to the output.
        out_scale: scale of the output's codes, (), float32; None gives floating-point output.
        out_zero_point: their zero point, (), uint8 or int8.

    Shape:
        (..., I), floating-point or codes, to (..., O).

    Raises:
        ValueError: in the call, what `vitzoo.kernels.int8_linear` refuses.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    x_scale: Tensor | None
    x_zero_point: Tensor | None
    out_scale: Tensor | None
    out_zero_point: Tensor | None

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        x_scale: Tensor | None = None,
        x_zero_point: Tensor | None = None,
        activation: str | None = None,
        out_scale: Tensor | None = None,
        out_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        buffers = {
            "weight_int8": weight_int8,
            "weight_scale": weight_scale,
            "bias": bias,
            "x_scale": x_scale,
            "x_zero_point": x_zero_point,
            "out_scale": out_scale,
            "out_zero_point": out_zero_point,
        }
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.detach().clone().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., O) of x (..., I): codes where there is an `out_scale`."""
        return int8_linear(
            x,
            self.weight_int8,
            self.weight_scale,
            self.bias,
            self.x_scale,
            self.x_zero_point,
            self.activation,
            self.out_scale,
            self.out_zero_point,
        )

    def extra_repr(self) -> str:
        """Say the sizes and how scales are found."""
        outputs, inputs = self.weight_int8.shape
        parts = [f"{inputs}, {outputs}", f"bias={self.bias is not None}"]
        parts.append(f"scale={'token' if self.x_scale is None else 'static'}")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        if self.out_zero_point is not None:
            parts.append(f"out={str(self.out_zero_point.dtype).removeprefix('torch.')}")
        return ", ".join(parts)


def unsigned(zero_point: Tensor) -> Tensor:
    """Return a zero point of codes 0 to 255 as uint8.

    Raises:
        ValueError: it lies outside them.
    """
    value = int(zero_point)
    if not 0 <= value <= 255:
        raise ValueError(f"zero point {value} does not fit into uint8")
    return torch.tensor(value, dtype=torch.uint8)
