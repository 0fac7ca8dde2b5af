"""Which multiply-accumulates run in integer kernels, read off the graph that a runtime runs or PyTorch's operators.

A file with Q and DQ nodes may run in float all the same: whether a runtime fuses them is known only after it has
optimized the graph. Here each product of that graph is counted by the shapes it had in a run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitzoo.benchmark.flops import count_flops
from vitzoo.export.check import open_session, run_session
from vitzoo.export.openvino import compile_openvino

# kernels whose products are of integers -> place of the second factor among the inputs
INTEGER = {
    "QLinearConv": 3,
    "ConvInteger": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
FLOATING = {
    "Conv": 1,
    "FusedConv": 1,
    "Gemm": 1,
    "FusedGemm": 1,
    "MatMul": 1,
    "FusedMatMul": 1,
}

# kernels with products that are not counted here: no figure is better than one without them
UNCOUNTED = ("Attention", "ConvTranspose", "Einsum", "MatMulNBits", "MultiHeadAttention", "QAttention")

# beginnings of the names of OpenVINO's nodes with products, and of those whose products are out of sight
OPENVINO_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
OPENVINO_UNCOUNTED = (
    *("Deconvolution", "DeformableConvolution", "If", "LLMMLP", "Loop", "GRU", "LSTM", "PagedAttention"),
    *("QKVProj", "RNN", "ScaledDotProductAttention", "TensorIterator"),
)


@dataclass(frozen=True)
class Coverage:
    """Products of one run of an optimized graph.

    Attributes:
        integer_macs: multiply-accumulates in integer kernels.
        total_macs: multiply-accumulates in all.
        by_kernel: kernel -> multiply-accumulates.
        floating: name of each product in floating point -> multiply-accumulates, the largest first.
    """

    integer_macs: int
    total_macs: int
    by_kernel: Mapping[str, int]
    floating: Mapping[str, int]

    @property
    def share(self) -> float:
        """Return the share of multiply-accumulates in integer kernels."""
        return self.integer_macs / max(1, self.total_macs)


def onnxruntime_coverage(path: str | Path, x: Tensor) -> Coverage:
    """Run a file in ONNX Runtime and count its products.

    Args:
        path: the file.
        x: images, (B, C, H, W), float32.

    Returns:
        The products of the one run; bodies of `Scan`, `If` and `Loop` included as they were run.

    Raises:
        ValueError: a kernel with products that cannot be counted.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        session = open_session(path, optimized=optimized, profile=Path(folder, "run"))
        run_session(session, x)
        events = json.loads(Path(session.end_profiling()).read_text())
        model = onnx.load(str(optimized), load_external_data=False)
    graphs = [model.graph]
    nodes: dict[str, Any] = {}
    shapes: dict[str, Sequence[int]] = {}
    while graphs:
        graph = graphs.pop()
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for node in graph.node:
            nodes[node.name] = node
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    by_kernel: dict[str, int] = {}
    floating: dict[str, int] = {}
    for event in events:
        kernel = event.get("args", {}).get("op_name")
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if kernel in UNCOUNTED:
            raise ValueError(f"{path} runs {kernel}, whose products cannot be counted")
        if kernel not in INTEGER and kernel not in FLOATING:
            continue
        node = nodes[event["name"].removesuffix("_kernel_time")]
        macs = _macs(node, kernel, event["args"], shapes)
        by_kernel[kernel] = by_kernel.get(kernel, 0) + macs
        if kernel in FLOATING:
            floating[node.name] = floating.get(node.name, 0) + macs
    integer = sum(macs for kernel, macs in by_kernel.items() if kernel in INTEGER)
    ordered = dict(sorted(floating.items(), key=lambda item: -item[1]))
    return Coverage(integer, sum(by_kernel.values()), by_kernel, ordered)


def torch_coverage(model: nn.Module, input_size: Sequence[int]) -> Coverage:
    """Run a module in PyTorch and count its products, by the definition of `onnxruntime_coverage`.

    Args:
        model: a float or converted model, a graph module, or the module of an exported program.
        input_size: (C, H, W) in pixels.

    Returns:
        The products of one image; `floating` and `by_kernel` by kind of work, as `count_flops` names it.

    Raises:
        ValueError: an operator ran whose products cannot be counted.
    """
    counted = count_flops(model, input_size)
    if counted.uncounted_ops:
        raise ValueError(
            f"the model runs {', '.join(counted.uncounted_ops)}, whose products cannot be counted"
        )
    macs = {
        kind: round(gmacs * 1e9) for kind, gmacs in counted.by_kind.items() if kind not in ("scan", "other")
    }
    floating = {kind: n for kind, n in macs.items() if kind != "integer matmul"}
    ordered = dict(sorted(floating.items(), key=lambda item: -item[1]))
    return Coverage(macs.get("integer matmul", 0), sum(macs.values()), macs, ordered)


def openvino_coverage(path: str | Path, x: Tensor) -> Coverage:
    """Run an IR or an ONNX file in OpenVINO and count its products, by the definition of `onnxruntime_coverage`.

    Args:
        path: the file.
        x: images, (B, C, H, W), float32.

    Returns:
        The products of the one run, by the kernels that OpenVINO says it executed.

    Raises:
        ImportError: OpenVINO is missing; the message has the line that installs it.
        ValueError: a kernel with products that cannot be counted.
    """
    compiled = compile_openvino(path, profile=True)
    request = compiled.create_infer_request()
    request.infer({0: x.detach().cpu().contiguous().numpy()})
    executed = {p.node_name: (p.node_type, p.exec_type) for p in request.get_profiling_info()}
    by_kernel: dict[str, int] = {}
    floating: dict[str, int] = {}
    integer = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        name = node.get_friendly_name()
        kind, kernel = executed.get(name, ("", ""))
        if kind.startswith(OPENVINO_UNCOUNTED):
            raise ValueError(f"{path} runs {kind}, whose products cannot be counted")
        if not kind.startswith(OPENVINO_PRODUCTS):
            continue
        # shapes are those of the run, also where the batch is dynamic
        out, first, second = (
            [int(n) for n in port.get_partial_shape().to_shape()]
            for port in (node.output(0), node.input(0), node.input(1))
        )
        contracted = math.prod(second[len(second) - len(out) + 1 :]) if kind == "Convolution" else first[-1]
        macs = math.prod(out) * contracted
        by_kernel[kernel] = by_kernel.get(kernel, 0) + macs
        if kernel.endswith(("_I8", "_i8", "_U8", "_u8")):
            integer += macs
        else:
            floating[name] = macs
    ordered = dict(sorted(floating.items(), key=lambda item: -item[1]))
    return Coverage(integer, sum(by_kernel.values()), by_kernel, ordered)


def _macs(node: Any, kernel: str, seen: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int:
    out = _shape(seen["output_type_shape"][0])
    if "Conv" in kernel:
        place = {**INTEGER, **FLOATING}[kernel]
        # a weight that is dequantized for a float kernel is no constant of the graph: the run knows its shape
        weight = shapes.get(node.input[place]) or _shape(seen["input_type_shape"][place])
        return math.prod(out) * math.prod(weight[1:])
    first = _shape(seen["input_type_shape"][0])
    transposed = any(a.name in ("transA", "transposeA") and a.i for a in node.attribute)
    return math.prod(out) * (first[-2] if transposed else first[-1])


def _shape(entry: Mapping[str, Sequence[int]]) -> list[int]:
    return [int(n) for n in next(iter(entry.values()))]
