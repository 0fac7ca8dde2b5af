"""How long each layer takes in ONNX Runtime in floating point and in each way of quantizing it, and whole files.

A layer is timed as a file of its own: float in, float out, with the nodes that the whole file would have. In the whole
file a layer may be cheaper, where two convolutions pass codes to each other or two layers share a quantized input, or
cost its float neighbours the layout and the fusions that they have without it; `file_speeds` times the whole.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitzoo.benchmark.timing import compare
from vitzoo.export.check import open_session, run_session
from vitzoo.export.onnx import require_packages
from vitzoo.export.quantized import OPSET, translations, write_quantized
from vitzoo.quantization.choice import FLOAT
from vitzoo.quantization.graph import Recorder, Site, convolution_arguments, get_tensor
from vitzoo.quantization.model import QuantizedModel

SECONDS = 0.15
ROUNDS = 8
FILE_SECONDS, FILE_ROUNDS = 2.5, 7
BATCH_SIZE = 8
IR_VERSION = 10
INPUT_SCALE, WEIGHT_SCALE = 0.04, 0.01


@dataclass(frozen=True)
class Layer:
    """What a layer's time depends on; layers of equal entries are timed once.

    Attributes:
        kind: "linear", "conv", "pointwise" or "product".
        operands: shapes of its activations.
        weight: shape of its weight, () for none.
        bias: whether it has one.
        relu: whether a ReLU alone reads it.
        convolution: stride, padding, dilation, groups; () for none.
        modes: to time.
    """

    kind: str
    operands: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...]
    bias: bool
    relu: bool
    convolution: tuple[Any, ...]
    modes: tuple[str, ...]


def layer_times(
    module: fx.GraphModule,
    sites: Sequence[Site],
    x: Tensor,
    modes: Mapping[str, Sequence[str]],
    threads: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, dict[str, float]]:
    """Time each layer in ONNX Runtime in each mode, modes of a layer interleaved.

    Args:
        module: the captured graph.
        sites: its sites.
        x: images, (B, C, H, W); repeated to the batch size.
        modes: site -> modes beside "float": "static", "dynamic", and both with " u8" behind for weights as uint8.
        threads: threads of the runtime, PyTorch's number if None.
        batch_size: images a batch.

    Returns:
        site -> mode -> milliseconds a batch, the least of the rounds.

    Raises:
        ImportError: an ONNX package is missing; the message has the line that installs it.
    """
    require_packages(check=True)
    shapes: dict[str, tuple[int, ...]] = {}
    watched = {name for site in sites if site.name in modes for name in site.operands}
    images = x[torch.arange(batch_size) % len(x)]
    with torch.inference_mode():
        Recorder(module, watched, lambda name, value: shapes.update({name: tuple(value.shape)})).run(images)
    nodes = {node.name: node for node in module.graph.nodes}
    layers = {
        site.name: _layer(module, site, nodes[site.node], shapes, (FLOAT, *modes[site.name]))
        for site in sites
        if site.name in modes
    }
    times = {layer: _timed(layer, threads) for layer in dict.fromkeys(layers.values())}
    return {name: times[layer] for name, layer in layers.items()}


def file_speeds(
    floating: Path,
    candidates: Sequence[QuantizedModel],
    model: nn.Module,
    x: Tensor,
    target: str,
    threads: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """Time each candidate's whole file in ONNX Runtime beside the float file, interleaved.

    Args:
        floating: ONNX file of the float model.
        candidates: quantized models.
        model: the float model, for the notes in the files.
        x: images, (B, C, H, W); repeated to the batch size.
        target: see `vitzoo.export.quantized.TARGETS`.
        threads: threads of the runtime, PyTorch's number if None.
        batch_size: images a batch.

    Returns:
        Speed of each relative to the float file: the least of the median of the rounds' ratios, the gate's measure,
        the ratio of the medians, and that of the least times, to which other processes add least.
    """
    images = x[torch.arange(batch_size) % len(x)]
    with tempfile.TemporaryDirectory() as folder:
        paths = {FLOAT: floating}
        for i, quantized in enumerate(candidates):
            paths[str(i)] = Path(folder, f"{i}.onnx")
            write_quantized(quantized, paths[str(i)], model, target)
        runs = {
            name: functools.partial(run_session, open_session(path, threads), images)
            for name, path in paths.items()
        }
        found = compare(runs, seconds=FILE_SECONDS, min_rounds=FILE_ROUNDS, threads=threads)
    base = found[FLOAT]
    return [
        min(t.ratio_to(base), base.median / t.median, min(base.seconds) / min(t.seconds))
        for t in (found[str(i)] for i in range(len(candidates)))
    ]


def _layer(
    module: fx.GraphModule,
    site: Site,
    node: fx.Node,
    shapes: Mapping[str, tuple[int, ...]],
    modes: tuple[str, ...],
) -> Layer:
    weight = () if site.weight is None else tuple(get_tensor(module, site.weight).shape)
    biased = site.weight is not None and len(node.args) > 2 and node.args[2] is not None
    convolution: tuple[Any, ...] = ()
    if site.kind == "conv":
        stride, padding, dilation, groups = convolution_arguments(node)[3:]
        convolution = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return Layer(
        "pointwise" if site.pointwise else site.kind,
        tuple(shapes[name] for name in site.operands),
        weight,
        biased,
        site.result != site.node,
        convolution,
        modes,
    )


def _timed(layer: Layer, threads: int | None) -> dict[str, float]:
    """Return mode -> least milliseconds."""
    generator = torch.Generator().manual_seed(0)
    feed = {
        f"x{i}": torch.randn(shape, generator=generator).numpy() for i, shape in enumerate(layer.operands)
    }
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for mode in layer.modes:
            path = Path(folder, f"{mode.replace(' ', '_')}.onnx")
            write_layer(layer, mode, path)
            sessions[mode] = open_session(path, threads)
        runs = {mode: functools.partial(session.run, None, feed) for mode, session in sessions.items()}
        found = compare(runs, seconds=SECONDS, min_rounds=ROUNDS, warmup_seconds=SECONDS, threads=threads)
    # the least of the rounds: other processes only add to it
    return {mode: 1e3 * min(timing.seconds) for mode, timing in found.items()}


class _Nodes:
    """Makes nodes as onnxscript's operator sets do, `op.MatMul(a, b)`, into a tape."""

    def __init__(self, tape: Any) -> None:
        self._tape = tape

    def __getattr__(self, kind: str) -> Any:
        def make(*inputs: Any, **attributes: Any) -> Any:
            outputs = 3 if kind == "DynamicQuantizeLinear" else 1
            if outputs == 1:
                return self._tape.op(kind, inputs, attributes)
            return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs)

        return make


def write_layer(layer: Layer, mode: str, path: Path) -> None:
    """Write an ONNX file of one layer with inputs x0 (and x1) and the output y, all float, in a mode.

    Weights are random: the time does not depend on them.
    """
    import onnx_ir as ir

    tape = ir.tape.Tape()
    op = _Nodes(tape)
    values = _constants(tape, layer, mode)
    inputs = [  # the batch is free, as in the whole file: with a fixed one the runtime fuses MatMul and Add in float
        ir.Value(name=f"x{i}", shape=ir.Shape(("batch", *shape[1:])), type=ir.TensorType(ir.DataType.FLOAT))
        for i, shape in enumerate(layer.operands)
    ]
    build = {"product": _product, "linear": _linear}.get(layer.kind, _conv)
    out = build(layer, mode, op, inputs, values)
    if layer.relu and layer.kind in ("linear", "product"):
        out = op.Relu(out)
    out.name, out.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        [out],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
        name=f"{layer.kind} {mode}",
    )
    ir.save(ir.Model(graph, ir_version=IR_VERSION), path)


def _constants(tape: Any, layer: Layer, mode: str) -> Iterator[Any]:
    """Yield the weight, its scales where it has codes, and the bias as a mode holds them."""
    import onnx_ir as ir

    if not layer.weight:
        return
    generator = torch.Generator().manual_seed(1)
    matrix = layer.kind == "linear" or mode.startswith("dynamic")
    out = layer.weight[0]
    shape = (layer.weight[1], out) if matrix else layer.weight
    if mode == FLOAT:
        yield tape.initializer(ir.tensor(torch.randn(shape, generator=generator).numpy(), name="w"))
    else:
        codes = torch.randint(-64, 64, shape, generator=generator)
        of_type = (codes + 128).to(torch.uint8) if mode.endswith(" u8") else codes.to(torch.int8)
        yield tape.initializer(ir.tensor(of_type.numpy(), name="w"))
        yield tape.initializer(ir.tensor(torch.full((out,), WEIGHT_SCALE).numpy(), name="w_scale"))
    if not layer.bias:
        yield None
    elif mode.startswith("static") and (layer.kind != "linear" or len(layer.operands[0]) == 2):
        # in steps of the accumulator: a bias of another scale is not fused
        yield tape.initializer(ir.tensor(torch.ones(out, dtype=torch.int32).numpy(), name="b"))
        step = torch.full((out,), WEIGHT_SCALE) * torch.tensor(INPUT_SCALE)
        yield tape.initializer(ir.tensor(step.numpy(), name="b_scale"))
    else:
        yield tape.initializer(ir.tensor(torch.ones(out).numpy(), name="b"))


def _operators(op: Any) -> Any:
    """Return how an operator of `vitzoo_qdq` is spelled with these nodes, by its name."""
    made = translations(op)
    return lambda name: made[getattr(torch.ops.vitzoo_qdq, name).default]


def _quantized(op: Any, x: Any, zero_point: int = 128) -> Any:
    return _operators(op)("fake_quantize")(x, INPUT_SCALE, zero_point, False)


def _zero_point(mode: str) -> int:
    return 128 if mode.endswith(" u8") else 0


def _linear(layer: Layer, mode: str, op: Any, inputs: Sequence[Any], values: Iterator[Any]) -> Any:
    x, weight = inputs[0], next(values)
    if mode == FLOAT:
        bias = next(values)
        out = op.MatMul(x, weight)
    else:
        scale, bias = next(values), next(values)
        if mode.startswith("dynamic"):
            return _operators(op)("dynamic_linear")(x, weight, scale, _zero_point(mode), bias)
        factors = _quantized(op, x), _operators(op)("dequantize")(weight, scale, 1, _zero_point(mode))
        if bias is not None and len(layer.operands[0]) == 2:
            return op.Gemm(*factors, _operators(op)("dequantize")(bias, next(values), 0, 0))
        out = op.MatMul(*factors)
    return out if bias is None else op.Add(out, bias)


def _conv(layer: Layer, mode: str, op: Any, inputs: Sequence[Any], values: Iterator[Any]) -> Any:
    x, weight = inputs[0], next(values)
    stride, padding, dilation, groups = layer.convolution
    attributes = dict(strides=stride, pads=(*padding, *padding), dilations=dilation, group=groups)
    if mode == FLOAT:
        out = op.Conv(x, weight, next(values), **attributes)
        return op.Relu(out) if layer.relu else out
    scale = next(values)
    if mode.startswith("dynamic"):
        out = _operators(op)("dynamic_pointwise")(x, weight, scale, _zero_point(mode), next(values))
        return op.Relu(out) if layer.relu else out
    dequantize, bias = _operators(op)("dequantize"), next(values)
    if bias is not None:
        bias = dequantize(bias, next(values), 0, 0)
    out = op.Conv(_quantized(op, x), dequantize(weight, scale, 0, _zero_point(mode)), bias, **attributes)
    # codes that begin at zero let the runtime leave the ReLU out
    return _quantized(op, op.Relu(out), 0) if layer.relu else _quantized(op, out)


def _product(layer: Layer, mode: str, op: Any, inputs: Sequence[Any], values: Iterator[Any]) -> Any:
    if mode == FLOAT:
        return op.MatMul(*inputs)
    if mode.startswith("dynamic"):
        return _operators(op)("dynamic_product")(*inputs)
    return op.MatMul(*(_quantized(op, x) for x in inputs))
