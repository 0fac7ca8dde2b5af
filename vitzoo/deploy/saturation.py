"""Which products of an exported file CPUs with AVX2 and without VNNI get wrong.

They sum pairs of u8 x s8 products in 16 bits, which saturates in silence, in ONNX Runtime, oneDNN and OpenVINO alike,
unless the weights keep to seven bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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


def saturating_nodes(graph: Any) -> list[str]:
    """Return the names of an ONNX graph's products of unsigned activations and full-range int8 weights."""
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
        return _whole_range(onnx.numpy_helper.to_array(tensor))

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


def saturating_operations(model: Any) -> list[str]:
    """Return the names of an OpenVINO graph's products with full-range int8 weights.

    oneDNN shifts signed activations to unsigned ones, so that those of either kind saturate.
    """
    found = []
    for op in model.get_ordered_ops():
        if op.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        source = op.input_value(1).get_node()
        while source.get_type_name() in ("Reshape", "Transpose", "Multiply", "Subtract", "Convert"):
            source = source.input_value(0).get_node()
        if source.get_type_name() == "Constant" and source.get_element_type().get_type_name() == "i8":
            found += [op.get_friendly_name()] if _whole_range(source.get_data()) else []
    return found


def _whole_range(codes: np.ndarray) -> bool:
    return codes.size > 0 and bool(np.min(codes) < _AVX2_LEAST or np.max(codes) > _AVX2_MOST)
