"""Which products of an exported file CPUs with AVX2 and without VNNI get wrong.

They sum pairs of u8 x s8 products in 16 bits, which saturates in silence, in ONNX Runtime, oneDNN and OpenVINO alike,
unless the weights keep to seven bits. Signed activations are shifted to unsigned ones first, so that they saturate too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# products with integer kernels -> place of the weight; Q and DQ nodes stand before the others
_INTEGER = {
    "MatMulInteger": 1,
    "ConvInteger": 1,
    "QLinearMatMul": 3,
    "QLinearConv": 3,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
_FLOATING = ("Conv", "Gemm", "MatMul")
_AVX2_LEAST, _AVX2_MOST = -64, 63


def saturating_nodes(graph: Any) -> list[str]:
    """Return the names of an ONNX graph's products of quantized activations and full-range int8 weights."""
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

    found = []
    for node in graph.node:
        if node.op_type in _INTEGER:
            weight = node.input[_INTEGER[node.op_type]]
        elif node.op_type in _FLOATING:
            behind = [source(name) for name in node.input[:2]]
            if not all(n is not None and n.op_type == "DequantizeLinear" for n in behind):
                continue
            weight = behind[1].input[0]
        else:
            continue
        if full_range(weight):
            found.append(node.name or node.output[0])
    return found


def saturating_operations(model: Any) -> list[str]:
    """Return the names of an OpenVINO graph's products with full-range int8 weights."""
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
