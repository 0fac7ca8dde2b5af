"""What an exported ONNX file says of itself: how images are prepared, its classes, and who may run it.

Facts stand in the JSON file that `vitzoo.deploy` writes beside a file, and in the notes that each file of ours carries.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitzoo.benchmark.runtimes import file_facts
from vitzoo.export.notes import PREPROCESSING, sha256
from vitzoo.export.onnx import require_packages

# products with integer kernels -> places of activation and weight; Q and DQ nodes stand before the others
_INTEGER = {
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
    "QGemm": (0, 3),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
}
_FLOATING = ("Conv", "Gemm", "MatMul")
_AVX2_LEAST, _AVX2_MOST = -64, 63


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX classifier.

    Attributes:
        path: the file.
        shape: of its input, (B, C, H, W); None where it is free.
        num_classes: of its output; None where the file does not say.
        preprocessing: what is known of `PREPROCESSING`.
        label_names: the classes, if they are known.
        target: whom it was made for, if it is known.
        params: elements of its constants, tables and scales included.
        saturates: names of products of unsigned activations and full-range int8 weights: CPUs with AVX2 and without
            VNNI sum pairs of them in 16 bits, which saturates silently.
    """

    path: Path
    shape: tuple[int | None, ...]
    num_classes: int | None
    preprocessing: dict[str, Any]
    label_names: list[str] | None
    target: str | None
    params: int
    saturates: tuple[str, ...]


def read_exported(path: str | Path) -> ExportedFile:
    """Read an ONNX file, its notes and the JSON file of its stem, if there is one.

    Args:
        path: `*.onnx`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: onnx is missing; the message has the line that installs it.
        ValueError: not an ONNX file, a JSON file that describes another file, or no single image input and one output.
    """
    require_packages(check=True)
    import onnx

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise ValueError(f"{path} is not an ONNX file: {error}") from error
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(
            f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs, expected images and logits"
        )
    shape, logits = _shape(inputs[0]), _shape(graph.output[0])
    if len(shape) != 4:
        raise ValueError(f"{path} takes input of {len(shape)} axes, expected images (B, C, H, W)")
    if len(logits) != 2:
        raise ValueError(f"{path} gives output of {len(logits)} axes, expected logits (B, classes)")
    notes = _notes({entry.key: entry.value for entry in model.metadata_props})
    facts = _sidecar(path)
    known = {**notes, **facts.get("preprocessing", {})}
    return ExportedFile(
        path=path,
        shape=shape,
        num_classes=logits[1] or facts.get("num_classes"),
        preprocessing={key: known[key] for key in PREPROCESSING if known.get(key) is not None},
        label_names=facts.get("label_names"),
        target=facts.get("target") or notes.get("vitzoo.target"),
        params=round(1e6 * file_facts(path)["param_count"]),
        saturates=tuple(_saturating(graph)),
    )


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(d.dim_value or None for d in value.type.tensor_type.shape.dim)


def _notes(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the notes that `vitzoo.export` put into a file, numbers as numbers."""
    notes: dict[str, Any] = {}
    for key, text in texts.items():
        try:
            notes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            notes[key] = text
    return notes


def _sidecar(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}; export the model again") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{beside} holds a {type(facts).__name__}, expected the facts of an exported file")
    if facts.get("sha256", sha256(path)) != sha256(path):
        raise ValueError(f"{beside} describes another file than {path}: its SHA-256 differs; export again")
    return facts


def _saturating(graph: Any) -> list[str]:
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}

    def source(name: str) -> Any:
        """Return the node behind those that only move elements."""
        node = producers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Flatten", "Identity"):
            node = producers.get(node.input[0])
        return node

    def full_range(name: str) -> bool:
        tensor = constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT8:
            return False
        codes = onnx.numpy_helper.to_array(tensor)
        return codes.size > 0 and bool(np.min(codes) < _AVX2_LEAST or np.max(codes) > _AVX2_MOST)

    def unsigned(node: Any) -> bool:
        if node is None or node.op_type != "QuantizeLinear":
            return node is not None and node.op_type == "DynamicQuantizeLinear"
        if len(node.input) < 3 or not node.input[2]:
            kind = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
            return kind in (0, onnx.TensorProto.UINT8)
        return _type(node.input[2]) == onnx.TensorProto.UINT8

    def _type(name: str) -> int:
        if name in constants:
            return constants[name].data_type
        value = [a.t for a in producers[name].attribute if a.name == "value"] if name in producers else []
        return value[0].data_type if value else 0

    found = []
    for node in graph.node:
        if node.op_type in _INTEGER:
            x, weight = (node.input[i] for i in _INTEGER[node.op_type])
            activation = source(x)
            whole = node.op_type == "DynamicQuantizeMatMul" or unsigned(activation)
            # what quantized operators hand on is unsigned where their zero point is
            if node.op_type.startswith("Q") and len(node.input) > 2:
                whole = _type(node.input[2]) == onnx.TensorProto.UINT8
        elif node.op_type in _FLOATING:
            behind = [source(name) for name in node.input[:2]]
            if not all(n is not None and n.op_type == "DequantizeLinear" for n in behind):
                continue
            weight, whole = behind[1].input[0], unsigned(source(behind[0].input[0]))
        else:
            continue
        if whole and full_range(weight):
            found.append(node.name or node.output[0])
    return found
