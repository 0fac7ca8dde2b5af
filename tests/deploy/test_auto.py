"""Layers are timed as the file will run them, and what auto chooses runs as it was simulated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.benchmark.timing import Timing
from vitzoo.deploy import GateError, Thresholds, export_quantized, onnxruntime_coverage
from vitzoo.deploy import auto as auto_module
from vitzoo.deploy import gate as gate_module
from vitzoo.deploy import times as times_module
from vitzoo.deploy.times import Layer, layer_times, write_layer
from vitzoo.export import export_onnx
from vitzoo.export.check import open_session, run_session
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization import api
from vitzoo.quantization.choice import FLOAT
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.quantization.graph import capture, find_sites
from vitzoo.quantization.qdq import integer_graph
from vitzoo.testing import image, relative_difference

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

SIZE = 32
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((5, 3, SIZE, SIZE), 9)


class Pointwise(nn.Module):
    """Convolutions that are products of matrices, with and without bias and ReLU, beside others."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.first = nn.Conv2d(16, 32, 1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.second = nn.Conv2d(32, 24, 1, bias=False)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.first(torch.relu(self.stem(x)))))
        return self.head(self.second(x).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Pointwise().eval()


def _dynamic(module: Any, sites: Any, x: Tensor, modes: Mapping[str, Sequence[str]]) -> Any:
    """Say that dynamic is the fastest, and all of uint8 faster still."""
    times = {FLOAT: 9.0, "static": 3.0, "static u8": 2.5, "dynamic": 2.0, "dynamic u8": 1.5}
    return {name: {mode: times[mode] for mode in (FLOAT, *found)} for name, found in modes.items()}


@pytest.mark.parametrize("unsigned", [False, True], ids=["s8", "u8"])
def test_pointwise_convolutions_run_as_products_with_dynamic_scales(
    model: nn.Module, unsigned: bool, tmp_path: Path
) -> None:
    # clipped codes and corrected biases would hide a wrong sign: a mean far from 0 shows it
    recipe = Recipe(
        "auto",
        activations="auto",
        error_budget=0.5,
        smooth="auto",
        bias_correction=True,
        rounding="least_squares",
        reduce_range=unsigned,
    )
    quantized = api.quantize(model, recipe, BATCHES, clock=_dynamic)
    ending = " u8" if unsigned else ""
    assert {layer.name: layer.mode for layer in quantized.layers} == {
        "stem": f"static{ending}",
        "first": f"dynamic{ending}",
        "deep": f"static{ending}",
        "second": f"dynamic{ending}",
        "head": f"dynamic{ending}",
    }
    with torch.no_grad():
        simulated, exact = quantized(HELD_BACK), model(HELD_BACK)
        graph = integer_graph(quantized, unsigned)
        assert relative_difference(graph(HELD_BACK), simulated) < 0.01
    path = tmp_path / "m.onnx"
    # the range of u8 x s8 is all used without a reduced one: only a machine that does not saturate may run that
    write_quantized(quantized, path, model, "x86-avx2")
    (out,) = run_session(open_session(path), HELD_BACK)
    assert relative_difference(out, simulated) < 0.01
    assert 1e-4 < relative_difference(out, exact) < 0.05
    coverage = onnxruntime_coverage(path, HELD_BACK[:1])
    assert coverage.share == 1.0, coverage.by_kernel
    kernels = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & {*coverage.by_kernel}
    assert kernels, coverage.by_kernel


LAYERS = {
    "linear": Layer("linear", ((4, 9, 16),), (24, 16), True, False, (), ()),
    "classifier": Layer("linear", ((4, 16),), (24, 16), True, False, (), ()),
    "linear without bias": Layer("linear", ((4, 16),), (24, 16), False, True, (), ()),
    "conv": Layer("conv", ((2, 8, 9, 9),), (16, 8, 3, 3), True, True, ((2, 2), (1, 1), (1, 1), 1), ()),
    "depthwise": Layer("conv", ((2, 8, 9, 9),), (8, 1, 3, 3), False, False, ((1, 1), (1, 1), (1, 1), 8), ()),
    "pointwise": Layer(
        "pointwise", ((2, 8, 9, 9),), (16, 8, 1, 1), True, True, ((1, 1), (0, 0), (1, 1), 1), ()
    ),
}


@pytest.mark.parametrize("mode", [FLOAT, "static", "static u8", "dynamic", "dynamic u8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_timed_in_the_kernels_of_its_mode(name: str, mode: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    if mode.startswith("dynamic") and layer.kind == "conv":
        pytest.skip("convolutions that are no products of matrices have no dynamic form")
    write_layer(layer, mode, tmp_path / "layer.onnx")
    coverage = onnxruntime_coverage(tmp_path / "layer.onnx", image(layer.operands[0]))
    assert coverage.share == (0.0 if mode == FLOAT else 1.0), coverage.by_kernel
    assert coverage.total_macs > 0


def test_every_layer_has_a_time_in_each_of_its_modes(model: nn.Module) -> None:
    graph = capture(model, BATCHES[0][:2])
    sites = find_sites(graph)
    modes = {site.name: ["static", "dynamic"] if site.pointwise else ["static"] for site in sites}
    times = layer_times(graph, sites, BATCHES[0], modes, threads=1, batch_size=2)
    assert {name: [*found] for name, found in times.items()} == {
        name: [FLOAT, *found] for name, found in modes.items()
    }
    assert all(ms > 0 for found in times.values() for ms in found.values())


def _at_speed(speed: float) -> Any:
    """Return a clock by which every whole file has this speed."""
    return lambda floating, candidates, *rest: [speed] * len(candidates)


def test_quantize_chooses_by_measured_times_and_the_sidecar_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_module, "file_speeds", _at_speed(2.0))
    model = vitzoo.create_model("deit_tiny_patch16_224", depth=1, num_classes=10, img_size=64).eval()
    batches = [image((4, 3, 64, 64), seed) for seed in range(2)]
    quantized = vitzoo.quantize(model, calibration_batches=batches, target="x86-avx2", threads=1)
    assert quantized.recipe.name == "auto"
    assert quantized.recipe.reduce_range
    assert quantized.logit_error <= load_recipe("auto").error_budget
    anything = Thresholds(coverage=0.0, speed=0.0)
    export_quantized(model, quantized, tmp_path / "m.onnx", batches[0], "x86-avx2", anything, threads=1)
    facts = json.loads((tmp_path / "m.json").read_text())
    layer = next(layer for layer in facts["layers"] if layer["name"] == "blocks.0.mlp.fc1")
    assert {*layer["costs"]} == {FLOAT, "static", "dynamic", "static u8", "dynamic u8"}
    assert layer["costs"][layer["mode"]]["ms"] > 0
    assert layer["why"]
    assert next(x for x in facts["layers"] if x["kind"] == "product")["why"] is None


def test_targets_bound_the_modes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def timed(module: Any, sites: Any, x: Tensor, modes: Mapping[str, Sequence[str]], threads: Any) -> Any:
        seen.update(modes)
        return {name: dict.fromkeys((FLOAT, *found), 1.0) for name, found in modes.items()}

    monkeypatch.setattr(auto_module, "layer_times", timed)
    monkeypatch.setattr(auto_module, "file_speeds", _at_speed(2.0))
    monkeypatch.setattr(auto_module, "this_machine", lambda: "x86-vnni")
    rt = vitzoo.quantize(model, "auto", BATCHES, target="tensorrt")
    assert seen == {}  # nothing here times TensorRT
    assert rt.recipe.symmetric
    assert {layer.mode for layer in rt.layers} <= {"static", FLOAT}
    assert rt.logit_error <= rt.recipe.error_budget
    avx2 = vitzoo.quantize(model, "auto", BATCHES, target="x86-avx2")
    costs = avx2.layers[-1].costs
    assert costs["dynamic u8"].ms == pytest.approx(1.418, abs=1e-3)
    assert costs["dynamic"].ms == 1.0
    with pytest.raises(ValueError, match="target is 'x86', expected one of"):
        vitzoo.quantize(model, "auto", BATCHES, target="x86")


def test_whole_files_are_timed_beside_the_float_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = api.quantize(model, Recipe("w8a8", reduce_range=True), BATCHES)
    floating = tmp_path / "float.onnx"
    export_onnx(model, floating, SIZE, check=False)
    outputs: list[Tensor] = []

    def clocked(runs: Mapping[str, Any], **_: Any) -> dict[str, Timing]:
        outputs.extend(run()[0] for run in runs.values())
        seconds = dict(zip(runs, ((3.0, 2.0), (1.0, 1.0), (1.5, 0.5)), strict=True))
        return {name: Timing(name, rounds, 1, 1, 1) for name, rounds in seconds.items()}

    monkeypatch.setattr(times_module, "compare", clocked)
    x = HELD_BACK[:3]
    speeds = times_module.file_speeds(floating, [quantized] * 2, model, x, "x86-avx2", 1, batch_size=4)
    assert speeds == [2.0, 2.5], "of the least times, of the medians"
    with torch.no_grad():
        exact = model(x[[0, 1, 2, 0]])
    assert relative_difference(outputs[0], exact) < 1e-5
    assert 1e-4 < relative_difference(outputs[1], exact) < 0.1


def test_the_gate_says_that_float_is_the_fastest_within_the_budget(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_module, "file_speeds", _at_speed(0.8))
    monkeypatch.setattr(
        auto_module, "layer_times", lambda m, sites, x, modes, threads: _dynamic(m, sites, x, modes)
    )
    monkeypatch.setattr(gate_module, "SECONDS", 0.05)
    quantized = vitzoo.quantize(model, "auto", BATCHES, target="x86-avx2")
    assert quantized.why_float is not None
    with pytest.raises(
        GateError, match=r"^float is the fastest that holds the error budget of 3\.0%.* 0\.80 times"
    ):
        export_quantized(model, quantized, tmp_path / "m.onnx", HELD_BACK, "x86-avx2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.float.onnx"]


def test_a_float_convolution_counts_though_its_weight_is_dequantized_at_run_time(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {"w": np.ones((4, 3, 3, 3), np.int8), "s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["dw"], axis=0),
        helper.make_node("Conv", ["x", "dw"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    found = onnxruntime_coverage(tmp_path / "m.onnx", image((2, 3, 8, 8)))
    assert (found.integer_macs, found.total_macs) == (0, 2 * 8 * 8 * 4 * 27)
