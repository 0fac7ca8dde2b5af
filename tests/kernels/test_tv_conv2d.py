"""tv_conv2d: every backend against the goldens, the float64 reference and the rules of torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vitzoo.kernels.common import native, triton_support
from vitzoo.kernels.common.backends import operators, use_backend
from vitzoo.kernels.tv_conv2d import tv_conv2d
from vitzoo.kernels.tv_conv2d.inputs import SHAPES, Shape, make_inputs, unfold_tv_conv2d
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_names,
    golden_state_dict,
    image,
    load_golden,
    outputs_and_gradients,
)

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
with use_backend("triton"):  # the interpreter runs only when asked for
    NO_TRITON = triton_support.why_not()
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=f"no Triton: {NO_TRITON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def _generate(layers: str, state: dict[str, Tensor]) -> Tensor:
    """Run a TVConv's generator of weights or biases, as its authors define it."""
    x, i = state["posi_map"], 0
    while f"{layers}.{i}.0.weight" in state:
        x = nn.functional.conv2d(x, state[f"{layers}.{i}.0.weight"], padding=1)
        norm = state[f"{layers}.{i}.1.weight"]
        x = nn.functional.layer_norm(x, norm.shape, norm, state[f"{layers}.{i}.1.bias"]).relu()
        i += 1
    return nn.functional.conv2d(x, state[f"{layers}.{i}.weight"], padding=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", golden_names("tvconv"))
def test_goldens(name: str, backend: str) -> None:
    golden = load_golden(name)
    state = {k: v.requires_grad_() for k, v in golden_state_dict(golden).items()}
    sizes = re.fullmatch(r".*_c(\d+)_k(\d+)_s(\d+)_.*", name)
    channels, side, stride = map(int, sizes.groups())
    generated = _generate("weight_layers", state)
    weight = generated.reshape(channels, side * side, *generated.shape[2:])
    bias = _generate("bias_layers", state)[0] if "bias_layers.0.0.weight" in state else None
    for case in golden["cases"]:
        with use_backend(backend):
            out = tv_conv2d(image(case["input"], case["seed"]), weight, bias, stride)
        assert_golden(out, case["outputs"]["output (B,C,H,W)"], 1e-5, "output")
        assert_golden(generated, case["outputs"]["generated weight (1, C*k*k, H, W)"], 1e-5, "weight")
        norms = case.get("grad_norms", {})
        if norms:
            (out * image(out.shape, 7)).sum().backward()
        for key, norm in norms.items():
            assert abs(float(state[key].grad.double().norm()) / norm - 1) < 1e-5, key


def test_a_golden_records_gradients() -> None:
    cases = [case for name in golden_names("tvconv") for case in load_golden(name)["cases"]]
    assert sum("grad_norms" in case for case in cases) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 5])
def test_a_constant_map_is_a_depthwise_convolution(side: int, stride: int, backend: str) -> None:
    x, kernel = image((2, 6, 11, 13)), image((6, 1, side, side), 1)
    expected = nn.functional.conv2d(x, kernel, stride=stride, padding=side // 2, groups=6)
    weight = kernel.flatten(1)[:, :, None, None].expand(-1, -1, *expected.shape[2:])
    with use_backend(backend):
        torch.testing.assert_close(tv_conv2d(x, weight, stride=stride), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["stride_2"])
    strided = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        expected = outputs_and_gradients(tv_conv2d, inputs)
        for name, value in outputs_and_gradients(tv_conv2d, strided).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend: str) -> None:
    inputs = make_inputs(Shape(0, 3, 4, 5, has_bias=True))
    with use_backend(backend):
        results = outputs_and_gradients(tv_conv2d, inputs)
    assert results["output 0"].shape == (0, 3, 4, 5)
    assert results["gradient of weight"].shape == inputs["weight"].shape
    assert not results["gradient of weight"].any()
    assert not results["gradient of bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(2, 6, 9, 21, has_bias=True), dtype)
    inputs |= {name: inputs[name] * 50 for name in ("x", "weight", "bias")}
    with use_backend(backend):
        results = outputs_and_gradients(tv_conv2d, inputs)
    assert all(x.isfinite().all() for x in results.values())


@needs_extension
@pytest.mark.parametrize("name", ["x", "weight", "dout"])
def test_a_nan_stays_where_the_windows_reach(name: str) -> None:
    inputs = make_inputs(Shape(2, 3, 9, 21))
    if name != "dout":
        inputs[name][1, 2, 4, 20] = float("nan")
    x, weight = (inputs[k].requires_grad_() for k in ("x", "weight"))
    out, dout = tv_conv2d(x, weight), torch.ones(2, 3, 9, 21)
    if name == "dout":
        dout[1, 2, 4, 20] = float("nan")
    dx, dweight = torch.autograd.grad(out, (x, weight), dout)
    with use_backend("reference"):
        reference = tv_conv2d(x, weight)
        rx, rweight = torch.autograd.grad(reference, (x, weight), dout)
    for ours, theirs in ((out, reference), (dx, rx), (dweight, rweight)):
        assert torch.equal(ours.isnan(), theirs.isnan())


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 3, 5, 6, has_bias=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 5, 6)}, r"x has shape \(3, 5, 6\), expected \(B, C, H, W\)"),
        ({"x": torch.zeros(2, 3, 5, 6).int()}, "x is torch.int32, expected a floating-point dtype"),
        ({"stride": 0}, "stride is 0, expected a positive number"),
        ({"stride": 2}, r"weight has shape \(3, 9, 5, 6\), expected .* = \(3, k \* k, 3, 3\)"),
        ({"weight": torch.zeros(4, 9, 5, 6)}, r"weight has shape \(4, 9, 5, 6\), expected"),
        ({"weight": torch.zeros(3, 4, 5, 6)}, "weight has 4 taps, expected the square of an odd number"),
        ({"weight": torch.zeros(3, 8, 5, 6)}, "weight has 8 taps, expected the square of an odd number"),
        ({"weight": torch.zeros(3, 9, 5, 6).half()}, "weight is torch.float16, expected the dtype of x"),
        (
            {"weight": torch.zeros(3, 9, 5, 6, device="meta")},
            "weight is on meta, expected the device of x, cpu",
        ),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(C, H_out, W_out\) = \(3, 5, 6\)"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv_conv2d(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "stride_2", "pointwise"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.tv_conv2d.default, tuple(inputs.values()))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(image((4, 9, 3, 4)))
        self.bias = nn.Parameter(image((4, 3, 4), 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 5, 7)
        return tv_conv2d(x.relu(), self.weight, self.bias, stride=2)


def test_compiles_whole_forward_and_backward() -> None:
    layer, x = _Layer(), image((2, 4, 5, 7))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        out = module(x)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    layer, path = _Layer().eval(), tmp_path / "layer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            layer, (image((2, 4, 5, 7)),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 4, 5, 7), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, layer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_a_depthwise_convolution() -> None:
    inputs = make_inputs(Shape(3, 5, 8, 10))
    with FlopCounterMode(display=False) as counter:
        tv_conv2d(**inputs)
    with FlopCounterMode(display=False) as depthwise:
        nn.functional.conv2d(inputs["x"], torch.zeros(5, 1, 3, 3), padding=1, groups=5)
    assert counter.get_total_flops() == depthwise.get_total_flops() == 2 * 3 * 5 * 80 * 9


def test_autocast_casts_the_inputs() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out = tv_conv2d(**inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), tv_conv2d(**inputs), rtol=2e-2, atol=6e-2)


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(tv_conv2d, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(tv_conv2d, make_inputs(shape, dtype, DEVICE), "triton", use_backend)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_unfold_formulation(shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float64)
    ours = outputs_and_gradients(tv_conv2d, inputs)
    theirs = outputs_and_gradients(unfold_tv_conv2d, inputs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = make_inputs(Shape(2, 2, 3, 4, has_bias=True), torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    options = {k: v for k, v in inputs.items() if k not in names}

    def call(*tensors: Tensor) -> Tensor:
        return tv_conv2d(**dict(zip(names, tensors, strict=True)), **options)

    with use_backend(backend):
        assert torch.autograd.gradcheck(call, [inputs[k].requires_grad_() for k in names])


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(Shape(2, 2, 3, 4, has_bias=True))
    x = inputs.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(tv_conv2d(x, **inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_every_backend_gives_its_reason() -> None:
    for backend in operators["tv_conv2d"].backends:
        reason = backend.why_not()
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(Shape(20, 6, 17, 18, has_bias=True)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(tv_conv2d, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@needs_extension
def test_eight_threads_at_once() -> None:
    calls = [make_inputs(Shape(2, 2, 3, 4, has_bias=True), seed=i) for i in range(8)]
    expected = [outputs_and_gradients(tv_conv2d, inputs) for inputs in calls]
    results: list[dict[str, Tensor]] = [{}] * 8

    def work(i: int) -> None:
        for _ in range(10):
            results[i] = outputs_and_gradients(tv_conv2d, calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


_FORCED = """
import torch
from vitzoo.kernels.common import native, triton_support
from vitzoo.kernels.tv_conv2d import tv_conv2d
from vitzoo.kernels.tv_conv2d.inputs import SHAPES, make_inputs
from vitzoo.testing import outputs_and_gradients
results = []
for shape in SHAPES.values():
    results += [float(x.double().norm()) for x in outputs_and_gradients(tv_conv2d, make_inputs(shape)).values()]
print(native.cpu_isa(), *results)
"""


@needs_extension
def test_every_instruction_set_of_this_cpu_agrees() -> None:
    best, results = native.cpu_isa(), {}
    for isa in ("baseline", "avx2", "avx512")[: ("baseline", "avx2", "avx512").index(best) + 1]:
        env = {**os.environ, "VITZOO_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", _FORCED], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        name, *values = done.stdout.split()
        assert name == isa
        results[isa] = [float(v) for v in values]
    for values in results.values():
        np.testing.assert_allclose(values, results[best], rtol=1e-5)
