"""Inputs of int8_linear: tests, `opcheck` and benchmarks all draw from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one call.

    Attributes:
        rows: M; a pair for x of three axes.
        inputs: K.
        outputs: O.
        x_codes: dtype of x where it comes as codes, "int8" or "uint8"; None for floating-point x.
        scale: "row" for one chosen for each row, "tensor" for one given, "given_row" for one given a row.
        zero_point: "int8" or "uint8", its dtype; None without.
        has_bias: with a bias.
        activation: None, "gelu" or "relu".
        out: dtype of the output's codes, "int8" or "uint8"; None for floating-point output.
    """

    rows: int | tuple[int, int]
    inputs: int
    outputs: int
    x_codes: str | None = None
    scale: str = "row"
    zero_point: str | None = None
    has_bias: bool = True
    activation: str | None = None
    out: str | None = None


SHAPES: dict[str, Shape] = {
    "tiny": Shape(1, 1, 1, has_bias=False),
    "one_row": Shape(1, 37, 70),
    "tile": Shape(6, 64, 64, has_bias=False),
    "odd": Shape(13, 67, 131),
    "three_axes": Shape((3, 7), 33, 17, activation="relu"),
    "static": Shape(19, 50, 65, scale="tensor"),
    "static_zero_point": Shape(8, 41, 129, scale="tensor", zero_point="int8", activation="relu"),
    "static_uint8": Shape(11, 23, 40, scale="tensor", zero_point="uint8", has_bias=False),
    "given_rows": Shape((3, 5), 30, 21, scale="given_row", zero_point="int8"),
    "codes": Shape(9, 68, 66, "int8", "tensor"),
    "codes_uint8": Shape((2, 6), 35, 31, "uint8", "tensor", "uint8"),
    "codes_uint8_as_they_are": Shape(15, 64, 49, "uint8", "tensor", "uint8"),  # packed already, for VNNI
    "to_codes": Shape(10, 45, 75, scale="tensor", activation="relu", out="int8"),
    "codes_to_codes": Shape(14, 63, 90, "uint8", "tensor", "uint8", out="uint8"),
    "tall": Shape(205, 130, 20),
}
# The models' own sizes, for benchmarks: 8 images of 197 tokens through the first layer of a DeiT-S MLP.
MODEL_SHAPES: dict[str, Shape] = {
    "deit_small_fc1": Shape(1576, 384, 1536, scale="tensor", has_bias=True),
    "deit_small_fc1_dynamic": Shape(1576, 384, 1536, has_bias=True),
    "deit_small_fc1_gelu_codes": Shape(
        1576, 384, 1536, "uint8", "tensor", "uint8", activation="gelu", out="uint8"
    ),
    "deit_small_fc2": Shape(1576, 1536, 384, "uint8", "tensor", "uint8"),
}


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of one call; codes cover their whole range.

    Args:
        shape: sizes and options.
        dtype: of x where it is floating-point.
        device: where.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = shape.rows if isinstance(shape.rows, tuple) else (shape.rows,)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def codes(name: str, *size: int) -> Tensor:
        kind = getattr(torch, name)
        info = torch.iinfo(kind)
        return torch.randint(info.min, info.max + 1, size, generator=generator).to(kind)

    x = codes(shape.x_codes, *rows, shape.inputs) if shape.x_codes else normal(*rows, shape.inputs).to(dtype)
    scale = {"row": None, "tensor": torch.tensor(0.023), "given_row": 0.02 + 0.005 * normal(*rows).abs()}
    zero_point = None
    if shape.zero_point is not None:
        zero_point = torch.tensor(
            -17 if shape.zero_point == "int8" else 121, dtype=getattr(torch, shape.zero_point)
        )
    out_zero_point = None if shape.out != "uint8" else torch.tensor(15, dtype=torch.uint8)
    inputs = {
        "x": x,
        "weight_int8": codes("int8", shape.outputs, shape.inputs),
        "weight_scale": (0.5 + torch.rand(shape.outputs, generator=generator)) / (74 * shape.inputs**0.5),
        "bias": normal(shape.outputs) if shape.has_bias else None,
        "x_scale": scale[shape.scale],
        "x_zero_point": zero_point,
        "activation": shape.activation,
        "out_scale": None if shape.out is None else torch.tensor(0.031),
        "out_zero_point": out_zero_point,
    }
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def float32_product(x: Tensor, weight_int8: Tensor, **others: Any) -> Tensor:
    """Multiply x by the transposed weight, both float32 already, and nothing else: the product to be beaten."""
    return torch.mm(x, weight_int8.t())


def float32_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the two matrices of a call in float32, as `float32_product` takes them."""
    return {"x": inputs["x"].float().flatten(0, -2), "weight_int8": inputs["weight_int8"].float()}


# What the speed of the operator is measured against; `BASELINE_INPUTS` turns a call's inputs into the baseline's.
BASELINES: dict[str, Callable[..., Tensor]] = {"torch.mm float32": float32_product}
BASELINE_INPUTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"torch.mm float32": float32_inputs}
