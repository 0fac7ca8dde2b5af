"""Cross-scan and cross-merge: every backend against the goldens, the reference and the rules of torch."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.cross_scan import cross_merge, cross_scan
from vitzoo.kernels.cross_scan.inputs import SHAPES, Shape, make_cross_merge_inputs, make_inputs
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_tensor,
    gpu_or_cpu,
    image,
    load_golden,
)

GOLDEN = {c["id"]: c for c in load_golden("ops/cross_scan")["cases"]}
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("triton", marks=needs_triton),
]
TRITON_DEVICE = gpu_or_cpu()[-1]


def _device(backend: str) -> str:
    return TRITON_DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, backend: str) -> None:
    golden = GOLDEN[case]
    ((name, spec),) = golden["inputs"].items()
    value = golden_tensor(spec).to(_device(backend)).requires_grad_()
    with use_backend(backend):
        if golden["op"] == "cross_scan":
            out = cross_scan(value)
        else:
            height, width = value.shape[3:]
            out = cross_merge(value.flatten(3), height, width).flatten(2)
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-6, "out")
    assert_golden(value.grad, golden["grads"][name], 1e-6, f"gradient of {name}")


def test_the_routes_by_hand() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    routes = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert torch.equal(cross_scan(x)[0, :, 0], torch.tensor(routes, dtype=torch.float32))
    assert torch.equal(cross_merge(cross_scan(x), 2, 3), 4 * x)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backends_move_the_same_numbers(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    x = make_inputs(shape, dtype, _device(backend))["x"]
    with use_backend("reference"):
        expected = cross_scan(x)
    with use_backend(backend):
        assert torch.equal(cross_scan(x), expected)
    assert_backend_close(cross_scan, {"x": x}, backend, use_backend)
    inputs = make_cross_merge_inputs(shape, dtype, _device(backend))
    assert_backend_close(cross_merge, inputs, backend, use_backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    x = make_inputs(SHAPES["odd"], device=_device(backend))["x"]
    last = x.to(memory_format=torch.channels_last)
    merge = make_cross_merge_inputs(SHAPES["odd"], device=_device(backend))
    strided = merge | {"y": merge["y"].transpose(2, 3).contiguous().transpose(2, 3)}
    with use_backend(backend):
        assert torch.equal(cross_scan(last), cross_scan(x))
        assert torch.equal(cross_merge(**strided), cross_merge(**merge))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend: str) -> None:
    x = torch.zeros(0, 3, 4, 5, device=_device(backend), requires_grad=True)
    with use_backend(backend):
        out = cross_merge(cross_scan(x), 4, 5)
        out.sum().backward()
    assert out.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_float32(dtype: torch.dtype, backend: str) -> None:
    # 256 + 1 + 1 is 256 where each sum is rounded to bfloat16, 258 in float32; 2 * 40000 - 2 * 40000 overflows in half
    y = torch.tensor([256.0, 1.0, 1.0, 0.0] if dtype is torch.bfloat16 else [4e4, -4e4, 4e4, -4e4])
    with use_backend(backend):
        out = cross_merge(y.to(dtype).view(1, 4, 1, 1).to(_device(backend)), 1, 1)
    assert out.item() == (258.0 if dtype is torch.bfloat16 else 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_scan(torch.zeros(2, 3, 4)), r"x has shape \(2, 3, 4\), expected \(B, C, H, W\)"),
        (
            lambda: cross_scan(torch.zeros(1, 1, 2, 2, dtype=torch.int32)),
            "x is torch.int32, expected a floating",
        ),
        (lambda: cross_merge(torch.zeros(1, 3, 2, 6), 2, 3), r"y has shape \(1, 3, 2, 6\), expected"),
        (
            lambda: cross_merge(torch.zeros(1, 4, 2, 6), 2, 2),
            r"expected \(B, 4, C, H \* W\) = \(B, 4, C, 4\)",
        ),
        (lambda: cross_merge(torch.zeros(1, 4, 2, 6), -2, -3), "H is -2, expected a size"),
        (lambda: cross_merge(torch.zeros(1, 4, 2, 6).int(), 2, 3), "y is torch.int32, expected a floating"),
    ],
    ids=["scan_rank", "scan_dtype", "merge_routes", "merge_length", "merge_size", "merge_dtype"],
)
def test_refused_inputs(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x = make_inputs(SHAPES["tiny"], torch.float64, _device(backend))["x"].requires_grad_()
    y = make_cross_merge_inputs(SHAPES["tiny"], torch.float64, _device(backend))["y"].requires_grad_()
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.cross_scan.default, (x,))
        torch.library.opcheck(torch.ops.vitzoo.cross_merge.default, (y, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x = make_inputs(SHAPES["tiny"], torch.float64, _device(backend))["x"].requires_grad_()
    y = make_cross_merge_inputs(SHAPES["tiny"], torch.float64, _device(backend))["y"].requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(cross_scan, [x])
        assert torch.autograd.gradcheck(lambda y: cross_merge(y, 2, 3), [y])


class _Sums(nn.Module):
    """Weights every place of every route, and merges."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(image((4, 1, 15), 3))

    def forward(self, x: Tensor) -> Tensor:
        return cross_merge(cross_scan(x) * self.weight, 3, 5)


def test_compiles_whole_forward_and_backward() -> None:
    module, x = _Sums(), image((2, 4, 3, 5))
    torch.compiler.reset()
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append([out, module.weight.grad.clone()])
    torch.testing.assert_close(results[1], results[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    module, path = _Sums().eval(), tmp_path / "sums.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module,
            (image((2, 4, 3, 5)),),
            path,
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 4, 3, 5), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(out, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_moving_counts_as_no_flops() -> None:
    with FlopCounterMode(display=False) as counter:
        cross_merge(cross_scan(torch.zeros(1, 2, 3, 4)), 3, 4)
    assert counter.get_total_flops() == 0


@needs_extension
def test_threads_change_no_bit() -> None:
    inputs, threads, results = make_cross_merge_inputs(Shape(3, 40, 30, 31)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cross_scan(cross_merge(**inputs)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(lambda _: cross_scan(cross_merge(**inputs)), range(16)):
            assert torch.equal(out, results[0])


def test_autocast_leaves_the_dtype_alone() -> None:
    x = image((1, 2, 3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_merge(cross_scan(x), 3, 4), 4 * x)


_FORCED = """
import torch
from vitzoo.kernels.common import native
from vitzoo.kernels.cross_scan import cross_merge, cross_scan
from vitzoo.kernels.cross_scan.inputs import SHAPES, make_inputs
x = make_inputs(SHAPES["odd"], torch.bfloat16)["x"]
y = cross_scan(x)
print(native.cpu_isa(), y.double().sum().item(), (y[:, 3, 0, 2] == x[:, 0, -3, -1]).all().item())
print(torch.equal(cross_merge(y, 17, 35), 4 * x))
"""


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_cpu_agrees(isa: str) -> None:
    sets = ("baseline", "avx2", "avx512")
    if sets.index(isa) > sets.index(native.cpu_isa()):
        pytest.skip(f"this CPU has no {isa}")
    done = subprocess.run(
        [sys.executable, "-c", _FORCED],
        capture_output=True,
        text=True,
        env={**os.environ, "VITZOO_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stderr
    total = 4 * make_inputs(SHAPES["odd"], torch.bfloat16)["x"].double().sum().item()
    name, found, corner, merged = done.stdout.split()
    assert (name, corner, merged) == (isa, "True", "True")
    assert abs(float(found) - total) < 1e-6 * abs(total)
