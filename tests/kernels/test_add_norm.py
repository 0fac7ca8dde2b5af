"""The residual norms: every backend against the goldens, the float64 reference and the rules of torch."""

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

from vitzoo.kernels.add_norm import add_layer_norm, add_rms_norm
from vitzoo.kernels.add_norm.inputs import (
    SHAPES,
    Shape,
    make_add_layer_norm_inputs,
    make_add_rms_norm_inputs,
)
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_tensor,
    image,
    load_golden,
    outputs_and_gradients,
)

GOLDEN = {c["id"]: c for c in load_golden("ops/add_rmsnorm")["cases"]}
FUNCTIONS = {
    "rms": (add_rms_norm, make_add_rms_norm_inputs),
    "layer": (add_layer_norm, make_add_layer_norm_inputs),
}
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
        out, stream = add_rms_norm(**{"residual": None, **inputs}, **golden["options"])
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    assert_golden(stream, golden["outputs"]["residual_out"], 1e-5, "residual_out")
    for name, recorded in golden["grads"].items():
        assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_cpu_is_as_close_as_the_reference(kind: str, shape: Shape, dtype: torch.dtype) -> None:
    function, make = FUNCTIONS[kind]
    assert_backend_close(function, make(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if n != "many_rows"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_triton_is_as_close_as_the_reference(kind: str, name: str, dtype: torch.dtype) -> None:
    function, make = FUNCTIONS[kind]
    assert_backend_close(function, make(SHAPES[name], dtype, DEVICE), "triton", use_backend)


@needs_triton
def test_triton_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"x is torch.float64, not float32"):
        add_rms_norm(**make_add_rms_norm_inputs(SHAPES["odd"], torch.float64, DEVICE))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_layer_norm_is_torchs_and_the_rms_norm_the_formula(kind: str) -> None:
    function, make = FUNCTIONS[kind]
    inputs = make(SHAPES["odd"], torch.float64)
    out, stream = function(**inputs)
    added = inputs["x"] + inputs["residual"]
    torch.testing.assert_close(stream, added, rtol=0, atol=0)
    if kind == "layer":
        expected = torch.nn.functional.layer_norm(added, (37,), inputs["weight"], inputs["bias"], 1e-5)
    else:
        expected = added / (added.square().mean(-1, keepdim=True) + 1e-5).sqrt() * inputs["weight"]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_non_contiguous_inputs(kind: str, backend: str) -> None:
    function, make = FUNCTIONS[kind]
    inputs = make(SHAPES["odd"], device=_device(backend))
    strided = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) and v.ndim == 3 else v
        for k, v in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        ours, expected = outputs_and_gradients(function, strided), outputs_and_gradients(function, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_empty_inputs(backend: str) -> None:
    inputs = make_add_rms_norm_inputs(Shape((0, 5), 8))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out, stream = add_rms_norm(**leaves)
        (out.sum() + stream.sum()).backward()
    assert out.shape == stream.shape == (0, 5, 8)
    assert not inputs["weight"].grad.any()


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_large_inputs_stay_finite(kind: str, dtype: torch.dtype, backend: str) -> None:
    function, make = FUNCTIONS[kind]
    inputs = make(Shape((3, 4), 50), dtype, _device(backend))
    inputs["x"] = inputs["x"].clamp(-3, 3) * 1000  # its square overflows float16
    with use_backend(backend):
        results = outputs_and_gradients(function, inputs)
    assert all(torch.isfinite(value).all() for value in results.values())


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_add_layer_norm_inputs(Shape((2, 3), 4)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x has shape \(\), expected \(\.\.\., C\)"),
        ({"residual": torch.zeros(2, 4)}, r"residual has shape \(2, 4\), expected that of x, \(2, 3, 4\)"),
        ({"weight": torch.zeros(3)}, r"weight has shape \(3,\), expected \(C,\) = \(4,\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected \(C,\) = \(4,\)"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "x is torch.int32, expected a floating-point dtype"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta, expected the device of x"),
        ({"eps": -1.0}, r"eps is -1.0, expected a number that is not negative"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**_small(**changes))
    if "bias" not in changes:
        inputs = _small(**changes)
        del inputs["bias"]
        with pytest.raises(ValueError, match=message):
            add_rms_norm(**inputs)


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("name", ["odd", "first_block", "narrow_residual"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_opcheck(kind: str, name: str, backend: str) -> None:
    inputs = FUNCTIONS[kind][1](SHAPES[name], torch.float64)
    order = ("x", "residual", "weight", *(("bias",) if kind == "layer" else ()), "eps")
    args = tuple(v.requires_grad_() if isinstance(v := inputs[k], Tensor) else v for k in order)
    with use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.vitzoo, f"add_{kind}_norm").default, args)


@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradcheck(kind: str, has_residual: bool, backend: str) -> None:
    function, make = FUNCTIONS[kind]
    inputs = make(Shape((2, 3), 5, has_residual), torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def norm(*tensors: Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)), **rest)

    with use_backend(backend):
        assert torch.autograd.gradcheck(norm, [inputs[k].requires_grad_() for k in names])


class _Blocks(nn.Module):
    """Two blocks that keep their stream beside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        x, stream = add_rms_norm(x, None, self.weight)
        x, stream = add_layer_norm(self.mix(x), stream, self.weight, self.bias, 1e-6)
        return self.mix(x) + stream


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    blocks, x = _Blocks(), image((2, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (blocks, compiled):
        blocks.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in blocks.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    blocks, path = _Blocks().eval(), tmp_path / "blocks.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            blocks,
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
            np.testing.assert_allclose(out, blocks(x).numpy(), rtol=1e-4, atol=1e-5)


def test_no_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        add_rms_norm(**make_add_rms_norm_inputs(SHAPES["odd"]))[0].sum()
    assert counter.get_total_flops() == 0


def test_autocast_keeps_the_stream_wide() -> None:
    inputs = make_add_rms_norm_inputs(Shape((2, 3), 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, stream = add_rms_norm(**{**inputs, "weight": inputs["weight"].bfloat16()})
    assert (out.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(stream, inputs["x"].float() + inputs["residual"], rtol=0, atol=0)


@needs_extension
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_number_of_threads_changes_no_bit(kind: str) -> None:
    function, make = FUNCTIONS[kind]
    inputs, threads, results = make(SHAPES["many_rows"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(function, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


_FORCED = """
from vitzoo.kernels.add_norm import add_layer_norm, add_rms_norm
from vitzoo.kernels.add_norm.inputs import SHAPES, make_add_layer_norm_inputs, make_add_rms_norm_inputs
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.testing import FLOORS, assert_backend_close
for shape in SHAPES.values():
    for dtype in FLOORS:
        assert_backend_close(add_rms_norm, make_add_rms_norm_inputs(shape, dtype), "cpu", use_backend)
        assert_backend_close(add_layer_norm, make_add_layer_norm_inputs(shape, dtype), "cpu", use_backend)
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
