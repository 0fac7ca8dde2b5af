"""The gated RMS norm: every backend against the goldens, the float64 reference and the rules of torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.kernels.rms_norm_gated import rms_norm_gated
from vitzoo.kernels.rms_norm_gated.inputs import SHAPES, Shape, make_inputs
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_tensor,
    image,
    load_golden,
    outputs_and_gradients,
)

GOLDEN = {c["id"]: c for c in load_golden("ops/rmsnorm_gated")["cases"]}
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CPU, TRITON = pytest.param("cpu", marks=needs_extension), pytest.param("triton", marks=needs_triton)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, backend: str) -> None:
    golden = GOLDEN[case]
    inputs = {k: golden_tensor(v).to(_device(backend)).requires_grad_() for k, v in golden["inputs"].items()}
    with use_backend(backend):
        out = rms_norm_gated(**inputs, **golden["options"])
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    for name, recorded in golden["grads"].items():
        assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(rms_norm_gated, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if n != "many_rows"])
def test_triton_is_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    assert_backend_close(rms_norm_gated, make_inputs(SHAPES[name], dtype, DEVICE), "triton", use_backend)


@needs_triton
def test_triton_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"x is torch.float64, not float32"):
        rms_norm_gated(**make_inputs(SHAPES["odd"], torch.float64, DEVICE))


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("name", ["odd", "odd_before"])
def test_non_contiguous_inputs(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], device=_device(backend))
    strided = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) and v.ndim == 3 else v
        for k, v in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        ours, expected = (outputs_and_gradients(rms_norm_gated, i) for i in (strided, inputs))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_empty_inputs(backend: str) -> None:
    inputs = make_inputs(Shape((0, 5), 8))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = rms_norm_gated(**leaves)
        out.sum().backward()
    assert out.shape == (0, 5, 8)
    assert not inputs["weight"].grad.any()


# NumPy's, in Triton's interpreter: exp(-z) is infinite there and sigmoid zero
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd", "odd_before"])
def test_large_inputs_stay_finite(name: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], dtype, _device(backend))
    inputs["x"], inputs["z"] = inputs["x"].clamp(-3, 3) * 16, inputs["z"].clamp(-3, 3) * 40
    with use_backend(backend):
        results = outputs_and_gradients(rms_norm_gated, inputs)
    assert all(torch.isfinite(value).all() for value in results.values())


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape((2, 3), 4)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x has shape \(\), expected \(\.\.\., C\)"),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\), expected \(C,\) = \(4,\)"),
        ({"z": torch.zeros(2, 4)}, r"z has shape \(2, 4\), expected that of x, \(2, 3, 4\)"),
        ({"z": torch.zeros(2, 3, 4, dtype=torch.int32)}, "z is torch.int32, expected a floating-point dtype"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta, expected the device of x"),
        ({"eps": float("nan")}, r"eps is nan, expected a number that is not negative"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm_gated(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("name", ["odd", "odd_before", "no_gate"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    args = tuple(v.requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values())
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.rms_norm_gated.default, args)


@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize(
    "shape",
    [Shape((2, 3), 5), Shape((2, 3), 5, norm_before_gate=True), Shape((4,), 3, has_z=False)],
    ids=["gate_first", "norm_first", "no_gate"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def norm(*tensors: Tensor) -> Any:
        return rms_norm_gated(**dict(zip(names, tensors, strict=True)), **rest)

    with use_backend(backend):
        assert torch.autograd.gradcheck(norm, [inputs[k].requires_grad_() for k in names])


class _Gate(nn.Module):
    """Both orders of norm and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        x = rms_norm_gated(x, self.weight, self.mix(x))
        return rms_norm_gated(x, self.weight, self.mix(x), 1e-6, norm_before_gate=True)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    gate, x = _Gate(), image((2, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (gate, compiled):
        gate.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in gate.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    gate, path = _Gate().eval(), tmp_path / "gate.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            gate,
            (image((2, 9, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 9, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, gate(x).numpy(), rtol=1e-4, atol=1e-5)


def test_no_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        rms_norm_gated(**make_inputs(SHAPES["odd"]))
    assert counter.get_total_flops() == 0


def test_autocast_leaves_x_alone() -> None:
    inputs = make_inputs(Shape((2, 3), 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = rms_norm_gated(**inputs)
        short = rms_norm_gated(**{**inputs, "x": inputs["x"].bfloat16()})
    torch.testing.assert_close(out, rms_norm_gated(**inputs), rtol=0, atol=0)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), out, rtol=2e-2, atol=2e-2)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(SHAPES["many_rows"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(rms_norm_gated, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


_FORCED = """
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.rms_norm_gated import rms_norm_gated
from vitzoo.kernels.rms_norm_gated.inputs import SHAPES, make_inputs
from vitzoo.testing import FLOORS, assert_backend_close
for shape in SHAPES.values():
    for dtype in FLOORS:
        assert_backend_close(rms_norm_gated, make_inputs(shape, dtype), "cpu", use_backend)
print(native.cpu_isa())
"""


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets_are_right_too(isa: str) -> None:
    if native.cpu_isa() == "baseline" != isa:
        pytest.skip("this CPU has only the baseline")
    done = subprocess.run(
        [sys.executable, "-c", _FORCED],
        capture_output=True,
        text=True,
        env={**os.environ, "VITZOO_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]
