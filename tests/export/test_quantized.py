"""Quantized ONNX files give the simulation's numbers, run in integers, and are handed over only through the gate."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vitzoo
from vitzoo.deploy import GateError, Thresholds, export_quantized, onnxruntime_coverage, this_machine
from vitzoo.deploy import gate as gate_module
from vitzoo.export.check import open_session, run_session
from vitzoo.export.notes import PREPROCESSING
from vitzoo.export.quantized import export_int8, for_target, write_quantized
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe, recipe_names
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.qdq import integer_graph
from vitzoo.testing import image, relative_difference

pytest.importorskip("onnxruntime", reason="needs the ONNX packages: pip install 'vitzoo[onnx]'")

SIZE = 64
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(2)]
HELD_BACK = image((5, 3, SIZE, SIZE), 9)
RECIPES = {
    "static": Recipe("static"),
    "dynamic": Recipe("dynamic", activations="dynamic"),
    "products": Recipe("products", products=True),
    "dynamic_products": Recipe("dynamic_products", activations="dynamic", products=True),
    "reduced": Recipe("reduced", reduce_range=True),
    "reparam": Recipe("reparam", norm="channel", fit="percentile"),
}


class Mixed(nn.Module):
    """Convolutions with and without ReLU, groups and bias, then tokens with attention."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.relu = nn.ReLU()
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1, dilation=1)
        self.block = timm.models.vision_transformer.Block(32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.deep(self.relu(self.stem(x))))
        x = self.block(x.flatten(2).transpose(1, 2))  # (B, 64, 32)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture(scope="module")
def made(model: nn.Module) -> dict[str, QuantizedModel]:
    return {name: quantize(model, recipe, BATCHES) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("unsigned", [False, True], ids=["s8", "u8"])
def test_the_graph_to_export_is_the_simulation(
    made: dict[str, QuantizedModel], name: str, unsigned: bool
) -> None:
    graph = integer_graph(made[name], unsigned)
    with torch.no_grad():
        # integer biases move a few codes across a tie: far less than quantization itself costs
        assert relative_difference(graph(HELD_BACK), made[name](HELD_BACK)) < 0.01
    held = {str(t.dtype) for n, t in graph.named_buffers() if n.endswith("weight_codes")}
    assert held == {"torch.uint8" if unsigned and name != "reduced" else "torch.int8"}
    assert not [n for n, _ in graph.named_parameters() if n in ("head.weight", "stem.weight")]


def test_quantizers_of_attention_stand_behind_what_computes_and_are_signed_where_that_saturates_nowhere(
    made: dict[str, QuantizedModel],
) -> None:
    for unsigned in (False, True):
        graph = integer_graph(made["products"], unsigned).graph
        quantizers = [n for n in graph.nodes if n.target is torch.ops.vitzoo_qdq.fake_quantize.default]
        signed = [n for n in quantizers if n.args[3]]
        assert [int(n.args[2]) for n in signed] == ([] if unsigned else [128, 128, 128])  # q, k, v
        moved = {torch.ops.aten.transpose.int, torch.ops.aten.reshape.default, torch.ops.aten.permute.default}
        behind = [n.args[0].target for n in [*signed, *quantizers]]
        assert torch.ops.aten.matmul.default in behind, "the projection's input"
        assert not moved & {n.args[0].target for n in signed}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("target", ["x86-vnni", "x86-avx2"])
def test_a_file_runs_in_integers_at_every_batch(
    model: nn.Module, made: dict[str, QuantizedModel], name: str, target: str, tmp_path: Path
) -> None:
    if target == "x86-vnni" and not RECIPES[name].reduce_range and this_machine() != target:
        pytest.skip("this machine saturates sums of full-range u8 x s8 products")
    path = tmp_path / "m.onnx"
    write_quantized(made[name], path, model, target)
    session = open_session(path)
    for batch in (1, 3, 8):
        x = image((batch, 3, SIZE, SIZE), 20 + batch)
        with torch.no_grad():
            exact, simulated = model(x), made[name](x)
        (out,) = run_session(session, x)
        # codes that lie on a tie may round either way: never more than quantization itself costs
        assert relative_difference(out, simulated) < 0.01
        assert relative_difference(out, exact) < 0.05
        if RECIPES[name].activations == "static" or batch == 1:
            assert relative_difference(out, exact) > 1e-5, "nothing was quantized"
    coverage = onnxruntime_coverage(path, HELD_BACK[:1])
    assert coverage.share > (0.99 if RECIPES[name].products else 0.83), coverage.by_kernel
    weights = {"uint8"} if target == "x86-avx2" and not RECIPES[name].reduce_range else {"int8"}
    assert _weight_types(path) == weights


class Single(nn.Module):
    """One product, so that the file and the simulation give it equal inputs."""

    num_classes = 12

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        convolution = nn.Conv2d(3, 12, 3, padding=1)
        self.layer = nn.Linear(SIZE, 12) if kind in ("static", "dynamic") else convolution
        self.act = {"relu": nn.ReLU(), "relu6": nn.ReLU6(inplace=True)}.get(kind, nn.Identity())
        with torch.no_grad():  # far beyond six
            convolution.weight.mul_(50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.layer(x))


@pytest.mark.parametrize("kind", ["static", "dynamic", "conv", "relu", "relu6"])
def test_one_layer_agrees_to_rounding_or_one_step_of_its_output(kind: str, tmp_path: Path) -> None:
    model = Single(kind).eval()
    recipe = Recipe("one", activations="dynamic" if kind == "dynamic" else "static")
    quantized = quantize(model, recipe, BATCHES)
    write_quantized(quantized, tmp_path / "m.onnx", model, "x86-avx2")
    (out,) = run_session(open_session(tmp_path / "m.onnx"), HELD_BACK)
    with torch.no_grad():
        simulated = quantized(HELD_BACK)
    difference = (out - simulated).abs()
    if kind in ("static", "dynamic"):
        assert difference.max() < 1e-5 * simulated.abs().max()
        return
    output = quantized.plans["layer"].output
    step = output.scale
    assert (output.zero_point == 0) == (kind != "conv")  # what an activation cuts has no codes
    assert (255 * step < 6.001) == (kind == "relu6")
    assert difference.max() < 1.001 * step
    assert (difference > 0.5 * step).float().mean() < 0.01


def _weight_types(path: Path) -> set[str]:
    import onnx

    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer]
    return {str(t.dtype) for t in tensors if t.ndim > 1 and t.dtype.itemsize == 1}


def _zero_points(path: Path) -> list[Any]:
    """Return the zero points of every QuantizeLinear and DequantizeLinear of a file."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return [constants[n.input[2]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]


def test_coverage_counts_the_products_of_the_optimized_graph(model: nn.Module, tmp_path: Path) -> None:
    import vitzoo

    vitzoo.export_onnx(model, tmp_path / "f.onnx", SIZE)
    found = onnxruntime_coverage(tmp_path / "f.onnx", HELD_BACK[:2])
    tokens, width = 64, 32
    convolutions = 16 * 16 * 16 * 48 + 16 * 16 * 16 * 9 + tokens * width * 16 * 9
    attention = 2 * tokens * tokens * width
    linear = tokens * width * width * (3 + 1 + 4 + 4) + 10 * width
    assert found.total_macs == 2 * (convolutions + attention + linear)
    assert found.integer_macs == 0
    assert sum(found.floating.values()) == found.total_macs


def test_the_gate_hands_over_a_file_with_its_figures(
    model: nn.Module, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    anything = Thresholds(coverage=0.8, speed=0.0, error=0.05)
    gate = export_quantized(model, made["dynamic"], path, HELD_BACK, "x86-avx2", anything, threads=1)
    assert sorted(os.listdir(tmp_path)) == ["m.json", "m.onnx"]
    facts: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())
    assert facts["gate"]["logit_error"] == gate.logit_error > 0
    assert facts["bytes"] == path.stat().st_size
    assert facts["preprocessing"]["mean"]
    assert gate.top1_agreement >= 0.8
    assert gate.images == len(HELD_BACK)
    assert gate.simulation_error < gate.logit_error


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        (Thresholds(coverage=1.0, speed=0), "integer coverage is 0.83"),
        (Thresholds(coverage=0, speed=1000), "speed is"),
        (Thresholds(coverage=0, speed=0, error=1e-9), "relative logit error is"),
    ],
)
def test_the_gate_keeps_the_float_file_instead(
    model: nn.Module, made: dict[str, QuantizedModel], tmp_path: Path, thresholds: Thresholds, words: str
) -> None:
    with pytest.raises(GateError, match=words) as caught:
        export_quantized(model, made["static"], tmp_path / "m.onnx", HELD_BACK, "x86-avx2", thresholds)
    assert os.listdir(tmp_path) == ["m.float.onnx"]
    assert caught.value.float_path == tmp_path / "m.float.onnx"
    (out,) = run_session(open_session(caught.value.float_path), HELD_BACK)
    with torch.no_grad():
        assert relative_difference(out, model(HELD_BACK)) < 1e-5


def test_a_scan_is_one_operator_in_the_simulation_and_spelled_out_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vim = vitzoo.create_model("vim_tiny_patch16_224", img_size=SIZE, depth=1, num_classes=10).eval()
    quantized = quantize(vim, RECIPES["static"], BATCHES)
    targets = [str(node.target) for node in quantized.float_graph.graph.nodes]
    assert targets.count("vitzoo.bidirectional_selective_scan.default") == 1
    assert "scan" not in targets
    with torch.no_grad():
        assert relative_difference(quantized.float_graph(HELD_BACK), vim(HELD_BACK)) < 1e-5
    path = tmp_path / "m.onnx"
    assert write_quantized(quantized, path, vim, "x86-vnni")["Scan"] == 1  # of both directions
    (out,) = run_session(open_session(path), HELD_BACK)
    with torch.no_grad():
        assert relative_difference(out, quantized(HELD_BACK)) < 0.01  # codes on a tie
        assert relative_difference(out, vim(HELD_BACK)) < 0.1


def test_a_float_file_at_hand_is_not_written_anew(
    model: nn.Module, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    at_hand, steps = tmp_path / "float.onnx", list[str]()
    vitzoo.export_onnx(model, at_hand, SIZE)
    give = {"progress": steps.append, "float_file": at_hand}
    path, lenient = tmp_path / "m.onnx", Thresholds(coverage=0, speed=0)
    gate = export_quantized(model, made["static"], path, HELD_BACK, "x86-avx2", lenient, **give)
    assert 0 < gate.logit_error < 0.5
    with pytest.raises(GateError):
        export_quantized(model, made["static"], path, HELD_BACK, "x86-avx2", Thresholds(speed=1000), **give)
    assert (tmp_path / "m.float.onnx").read_bytes() == at_hand.read_bytes()
    assert "export the float model" not in steps
    with pytest.raises(ValueError, match="a single ONNX file only"):
        export_quantized(model, made["static"], tmp_path / "m.pt2", HELD_BACK, "x86-avx2", **give)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    model: nn.Module,
    made: dict[str, QuantizedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    four = quantize(model, load_recipe("w4a4"), BATCHES)
    with pytest.raises(ValueError, match="recipe 'w4a4' can only be simulated"):
        write_quantized(four, tmp_path / "m.onnx", model, "x86-vnni")
    with pytest.raises(ValueError, match="target is 'x86', expected one of x86-vnni, x86-avx2"):
        write_quantized(made["static"], tmp_path / "m.onnx", model, "x86")
    with pytest.raises(ValueError, match="no held-back images"):
        export_quantized(model, made["static"], tmp_path / "m.onnx", HELD_BACK[:0], "x86-avx2")
    with pytest.raises(ValueError, match="has zero points, which TensorRT refuses"):
        export_quantized(model, made["static"], tmp_path / "m.onnx", HELD_BACK, "tensorrt")
    monkeypatch.setattr(gate_module, "this_machine", lambda: "x86-avx2")
    for target in ("x86-vnni", "arm"):
        with pytest.raises(ValueError, match=f"{target} cannot be checked on this machine, x86-avx2"):
            export_quantized(model, made["static"], tmp_path / "m.onnx", HELD_BACK, target)
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        write_quantized(made["static"], tmp_path / "no" / "m.onnx", model, "x86-vnni")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_read(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.runs_as_integers == name.startswith(("auto", "w8a8"))


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "first_last_bits"])
def test_a_width_other_than_eight_anywhere_is_simulated(field: str) -> None:
    assert not Recipe("r", **{field: 4}).runs_as_integers


def test_an_unknown_recipe_names_the_likeliest() -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'w8a8_smoth'; did you mean 'w8a8_smooth'\? Recipes: auto, fq, "
    ):
        load_recipe("w8a8_smoth")


def test_a_target_that_saturates_gets_seven_bits() -> None:
    recipe = load_recipe("w8a8")
    assert for_target(recipe, "x86-vnni") is recipe
    assert for_target(recipe, "x86-avx2") == dataclasses.replace(recipe, reduce_range=True)
    with pytest.raises(ValueError, match="target is 'x86'"):
        for_target(recipe, "x86")


@pytest.mark.parametrize("name", ["w8a8_accurate", "w8a8_openvino"])
def test_a_file_for_tensorrt_is_symmetric_and_the_simulation(
    model: nn.Module, tmp_path: Path, name: str
) -> None:
    recipe = for_target(load_recipe(name), "tensorrt")
    assert (recipe.symmetric, recipe.conv_codes) == (True, False)
    quantized = quantize(model, recipe, BATCHES)
    path = tmp_path / "m.onnx"
    gate = export_quantized(model, quantized, path, HELD_BACK, "tensorrt", Thresholds(coverage=0.8))
    assert (gate.speed, gate.float_ms, gate.int8_ms) == (None, None, None)
    assert gate.coverage == pytest.approx(quantized.quantized_macs)
    assert gate.coverage > (0.99 if recipe.products else 0.83)  # attention's two products are left
    assert 1e-4 < gate.logit_error < 0.05
    # on equal inputs both round alike: no kernel of integers takes part
    assert gate.simulation_error < 1e-3 * gate.logit_error
    zeros = _zero_points(path)
    assert {str(z.dtype) for z in zeros} == {"int8"}  # of activations and weights; biases are floats
    assert not any(z.any() for z in zeros)
    weighted = sum(site.kind != "product" for site in quantized.sites)
    assert len(zeros) >= 3 * weighted  # a pair for each activation, a node for each weight
    with pytest.raises(ValueError, match=r"TensorRT reads ONNX files: name it m\.onnx, not m\.pt2"):
        export_quantized(model, quantized, tmp_path / "m.pt2", HELD_BACK, "tensorrt")


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w8a8_reparam"])
def test_recipes_with_zero_points_are_refused_for_tensorrt(
    model: nn.Module, made: dict[str, QuantizedModel], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match=f"TensorRT cannot run recipe '{name}'"):
        for_target(load_recipe(name), "tensorrt")
    with pytest.raises(ValueError, match="has zero points, which TensorRT refuses"):
        write_quantized(made["static"], tmp_path / "m.onnx", model, "tensorrt")
    for wrong in ({}, {"conv_codes": False, "fit": "search"}, {"conv_codes": False, "weight_bits": 4}):
        with pytest.raises(ValueError, match="is symmetric, expected uniform quantizers of 8 bits"):
            Recipe("r", symmetric=True, **wrong)
    assert for_target(load_recipe("w4a4"), "tensorrt") == load_recipe("w4a4")  # simulated for everyone
    assert os.listdir(tmp_path) == []


class Joined(nn.Module):
    """A linear layer behind a concatenation, and one that reads nothing but zeros and tiny values."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dead, self.tiny = nn.Linear(6, 4), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.mean((2, 3))
        joined = torch.cat([channels, 3 + channels], 1)
        return self.first(joined) + self.dead(0 * channels) + self.tiny(1e-6 * channels)


def test_zero_points_are_zero_for_tensorrt_also_of_nothing(tmp_path: Path) -> None:
    model = Joined().eval()
    quantized = quantize(model, for_target(load_recipe("w8a8"), "tensorrt"), BATCHES)
    write_quantized(quantized, tmp_path / "m.onnx", model, "tensorrt")
    zeros = _zero_points(tmp_path / "m.onnx")
    assert len(zeros) == 9
    assert not any(z.any() for z in zeros)
    assert {str(z.dtype) for z in zeros} == {"int8"}


@pytest.mark.parametrize(
    ("reduced", "target"), [(False, "x86-vnni"), (True, "x86-avx2"), (False, "x86-avx2")]
)
def test_codes_behind_a_concatenation_are_signed_where_weights_are(
    tmp_path: Path, reduced: bool, target: str
) -> None:
    model = Joined().eval()
    quantized = quantize(model, Recipe("r", reduce_range=reduced), BATCHES)
    (quantizer,) = quantized.plans["first"].operands
    assert int(quantizer.zero_point) == 128  # affine would be 30 and less
    write_quantized(quantized, tmp_path / "m.onnx", model, target)
    kinds = [str(z.dtype) for z in _zero_points(tmp_path / "m.onnx") if not z.shape]
    assert kinds.count("int8") == (0 if target == "x86-avx2" and not reduced else 2)  # Q and DQ


def test_a_file_for_arm_has_signed_codes_of_the_same_values(
    model: nn.Module, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    outputs = []
    for target in ("x86-avx2", "arm"):
        write_quantized(made["reduced"], tmp_path / f"{target}.onnx", model, target)
        session = open_session(tmp_path / f"{target}.onnx", as_written=True)
        outputs.append(run_session(session, HELD_BACK)[0])
    assert torch.equal(*outputs)
    x86, arm = (_zero_points(tmp_path / f"{target}.onnx") for target in ("x86-avx2", "arm"))
    assert [str(z.dtype).removeprefix("u") for z in x86] == [str(z.dtype) for z in arm]
    assert "uint8" in {str(z.dtype) for z in x86}
    assert onnxruntime_coverage(tmp_path / "arm.onnx", HELD_BACK[:1]).share > 0.83


def test_an_int8_file_to_measure_has_signed_weights_on_every_target(model: nn.Module, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    export_int8(model, tmp_path / "m.onnx", BATCHES[0], "x86-avx2")
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    codes = {t.data_type: onnx.numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) > 1}
    assert onnx.TensorProto.UINT8 not in codes
    assert abs(codes[onnx.TensorProto.INT8].astype(int)).max() <= 64


def test_a_file_notes_all_of_the_preprocessing(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = timm.create_model("mobilenetv3_small_050").eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    vitzoo.export_onnx(model, tmp_path / "m.onnx", 64, check=False)
    noted = {e.key: e.value for e in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert noted["crop_mode"] == "squash"
    assert {*PREPROCESSING} <= {*noted}
