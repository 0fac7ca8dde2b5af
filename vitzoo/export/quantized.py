"""Export of a quantized model to ONNX: Q and DQ nodes where scales are static, integer products where they are not.

The translations below are those of the operators in `vitzoo.quantization.qdq`. Standard ONNX operators only.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.onnx import describe, require_packages, translate
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.qdq import integer_graph

TARGETS = ("x86-vnni", "x86-avx2", "arm", "tensorrt")
SIGNED = ("arm", "tensorrt")  # these run products of s8 x s8, x86 of u8 x s8
OPSET = 20


def write_quantized(
    quantized: QuantizedModel, path: str | os.PathLike[str], model: nn.Module, target: str, opset: int = OPSET
) -> dict[str, int]:
    """Write a quantized model as an ONNX file with a dynamic batch, unchecked; `vitzoo.deploy` checks it.

    Args:
        quantized: from `quantize`, by a recipe whose `runs_as_integers` is true.
        path: file to write, whole or not at all.
        model: the float model, for the notes in the file.
        target: who will run it, one of `TARGETS`. For "x86-avx2" weights with codes outside [-64, 63] become uint8; for
            "arm" and "tensorrt" activations with static scales are int8, and for the latter the recipe has to be
            symmetric.
        opset: ONNX operator set, 20 to 23.

    Returns:
        node type -> count.

    Raises:
        ImportError: an ONNX package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written.
        ValueError: an unknown target, a recipe that is simulated only, or one for "tensorrt" that is not symmetric.
        ExportError: the exporter refused the model.
    """
    require_packages(check=False)
    check_target(target)
    check_zero_points(quantized, target)
    destination = Path(path)
    with scratch_folder(destination) as folder:
        graph = integer_graph(quantized, target == "x86-avx2", target in SIGNED)
        size = quantized.input_size
        x = torch.zeros(2, *size)
        with torch.no_grad():
            program = translate(graph, x, ["logits"], opset, translations())
        notes = {"vitzoo.recipe": quantized.recipe.name, "vitzoo.target": target}
        describe(program.model, model, size, notes)
        program.save(str(folder / destination.name), external_data=False)
        publish(folder, destination)
    return dict(sorted(Counter(node.op_type for node in program.model.graph.all_nodes()).items()))


def export_int8(
    model: nn.Module, path: str | os.PathLike[str], images: Tensor, target: str, recipe: str = "w8a8"
) -> None:
    """Quantize a model and write it as an ONNX file without the gate of `vitzoo.deploy`, to measure it.

    Args:
        model: float32, on the CPU; it is not changed.
        path: file to write, whole or not at all.
        images: to calibrate on, (B, C, H, W).
        target: who will run it, one of `TARGETS`.
        recipe: name of a recipe whose `runs_as_integers` is true.

    Raises:
        ImportError, OSError, ValueError, ExportError: as `write_quantized` and `vitzoo.quantization.quantize`.
    """
    write_quantized(quantize(model, for_target(load_recipe(recipe), target), [images]), path, model, target)


def check_target(target: str) -> None:
    """Raise ValueError unless a target is one of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")


def check_zero_points(quantized: QuantizedModel, target: str) -> None:
    """Raise ValueError where a quantized model has zero points and the target takes none."""
    if target == "tensorrt" and quantized.recipe.runs_as_integers and not quantized.recipe.symmetric:
        raise ValueError(
            f"recipe {quantized.recipe.name!r} has zero points, which TensorRT refuses; quantize with target 'tensorrt'"
        )


def for_target(recipe: Recipe, target: str) -> Recipe:
    """Return a recipe as runtimes on the target run it.

    For "x86-avx2" weights have seven bits, which never saturate. For "tensorrt" a recipe that runs as integers is
    symmetric, and "auto", which cannot time layers there, is static under its error budget.

    Raises:
        ValueError: an unknown target, or a recipe that TensorRT cannot run.
    """
    check_target(target)
    if target == "x86-avx2":
        return dataclasses.replace(recipe, reduce_range=True)
    if target != "tensorrt" or not recipe.runs_as_integers:
        return recipe
    if recipe.activations == "dynamic" or recipe.norm != "tensor":
        raise ValueError(
            f"TensorRT cannot run recipe {recipe.name!r}: its scales are static and have no zero points; take auto, "
            "w8a8, w8a8_smooth or w8a8_accurate"
        )
    return dataclasses.replace(recipe, symmetric=True, conv_codes=False, activations="static")


def translations(op: Any = None) -> dict[Any, Callable[..., Any]]:
    """Return operator -> translation.

    Args:
        op: what makes nodes, `op.MatMul(a, b)`; onnxscript's operator set, as torch.onnx.export takes it, if None.
    """
    import onnx_ir as ir
    from onnxscript import opset20

    op = opset20 if op is None else op

    def constant(value: Any, dtype: Any) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=dtype))

    def zero_points(codes: Any, zero_point: int, axis: int) -> Any:
        return constant([zero_point] * int(codes.shape[axis]), codes.dtype)

    def fake_quantize(x: Any, scale: float, zero_point: int, signed: bool) -> Any:
        s = constant(scale, ir.DataType.FLOAT)
        z = constant(*((zero_point - 128, ir.DataType.INT8) if signed else (zero_point, ir.DataType.UINT8)))
        return op.DequantizeLinear(op.QuantizeLinear(x, s, z), s, z)

    def dequantize(codes: Any, scale: Any, axis: int, zero_point: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_points(codes, zero_point, axis), axis=axis)

    def scaled(accumulator: Any, x_scale: Any, scale: Any) -> Any:
        return op.Mul(op.Cast(accumulator, to=ir.DataType.FLOAT), op.Mul(x_scale, scale))

    def dynamic_linear(x: Any, codes: Any, scale: Any, zero_point: int, bias: Any) -> Any:
        q, s, z = op.DynamicQuantizeLinear(x)
        product = op.MatMulInteger(q, codes, z, zero_points(codes, zero_point, 1))
        out = scaled(product, s, scale)
        return out if bias is None else op.Add(out, bias)

    def dynamic_pointwise(x: Any, codes: Any, scale: Any, zero_point: int, bias: Any) -> Any:
        q, s, z = op.DynamicQuantizeLinear(x)
        channels_last = op.Transpose(q, perm=[0, 2, 3, 1])  # of codes: a quarter of the bytes
        product = op.MatMulInteger(channels_last, codes, z, zero_points(codes, zero_point, 1))
        out = scaled(product, s, scale)
        return op.Transpose(out if bias is None else op.Add(out, bias), perm=[0, 3, 1, 2])

    def dynamic_product(a: Any, b: Any) -> Any:
        qa, sa, za = op.DynamicQuantizeLinear(a)
        qb, sb, zb = op.DynamicQuantizeLinear(b)
        return scaled(op.MatMulInteger(qa, qb, za, zb), sa, sb)

    operators = torch.ops.vitzoo_qdq
    return {
        operators.fake_quantize.default: fake_quantize,
        operators.dequantize.default: dequantize,
        operators.dynamic_linear.default: dynamic_linear,
        operators.dynamic_pointwise.default: dynamic_pointwise,
        operators.dynamic_product.default: dynamic_product,
    }
