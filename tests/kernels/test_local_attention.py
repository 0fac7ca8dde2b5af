"""local_attention: every backend against the goldens, the float64 reference and the rules of torch."""

from __future__ import annotations

import os
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
from vitzoo.kernels.local_attention import local_attention
from vitzoo.kernels.local_attention.inputs import SHAPES, Shape, make_inputs, unfold_attention
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
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


GOLDEN = {
    "msa_ops_k3": {"kernel_size": 3},
    "msa_ops_k3_d2": {"kernel_size": 3, "dilation": 2},
    "msa_ops_k5x1": {"kernel_size": (5, 1)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_goldens(name: str, backend: str) -> None:
    cases = load_golden(f"tic/{name}")["cases"]
    assert cases
    for case in cases:
        inputs = {k: image(v["shape"], v["seed"]).requires_grad_() for k, v in case["inputs"].items()}
        with use_backend(backend):
            out = local_attention(**inputs, **GOLDEN[name])
            (out * image(out.shape, 7)).sum().backward()
        assert_golden(out, case["outputs"]["out (B,C,H,W)"], 1e-5, "out")
        for key, x in inputs.items():
            assert_golden(x.grad, case["outputs"][f"grad_{key}"], 1e-5, f"gradient of {key}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_groups_of_channels(backend: str) -> None:
    inputs = make_inputs(Shape(2, 6, 5, 7, num_heads=3))
    with use_backend(backend):
        whole = local_attention(**inputs)
        for head in range(3):
            part = {k: v[:, 2 * head : 2 * head + 2] for k, v in inputs.items() if isinstance(v, Tensor)}
            alone = local_attention(**part, kernel_size=3, scale=inputs["scale"])
            torch.testing.assert_close(whole[:, 2 * head : 2 * head + 2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_beyond_the_map_take_part(backend: str) -> None:
    ones = torch.ones(1, 2, 3, 3)
    with use_backend(backend):
        out = local_attention(torch.zeros_like(ones), ones, ones, 3)
    # equal weights: a corner sees 4 of its 9 positions, an edge 6
    expected = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9
    torch.testing.assert_close(out, expected.expand_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    qkv = image((2, 30, 7, 9))
    sliced = qkv.chunk(3, 1)
    whole = [x.contiguous() for x in sliced]
    last = [x.contiguous(memory_format=torch.channels_last) for x in sliced]
    with use_backend(backend):
        expected = outputs_and_gradients(
            local_attention, dict(zip("qkv", whole, strict=True)) | {"kernel_size": 3}
        )
        for inputs in (sliced, last):
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = local_attention(*leaves, 3)
            torch.testing.assert_close(out, expected["output 0"], rtol=1e-6, atol=1e-6)
            (out.double() * image(out.shape, 1).double()).sum().backward()
            for name, x in zip("qkv", leaves, strict=True):
                torch.testing.assert_close(x.grad, expected[f"gradient of {name}"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty_inputs(size: tuple[int, ...], backend: str) -> None:
    q, k, v = (torch.zeros(size, requires_grad=True) for _ in range(3))
    with use_backend(backend):
        out = local_attention(q, k, v, 3)
        out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(2, 16, 9, 11, num_heads=2), dtype)
    for name in "qkv":
        inputs[name] = inputs[name] * 50
    with use_backend(backend):
        results = outputs_and_gradients(local_attention, inputs | {"scale": 1.0})
    assert all(x.isfinite().all() for x in results.values())


@needs_extension
def test_a_nan_stays_in_the_windows_that_see_it() -> None:
    inputs = make_inputs(Shape(2, 3, 9, 21))
    inputs["v"][1, 2, 4, 15] = float("nan")
    out = local_attention(**inputs)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[1, 2, 3:6, 14:17] = True
    assert torch.equal(out.isnan(), expected)


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 4, 5, 6)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 5, 6)}, r"q has shape \(4, 5, 6\), expected \(B, C, H, W\)"),
        ({"q": torch.zeros(2, 4, 5, 6).int()}, "q is torch.int32, expected a floating-point dtype"),
        ({"k": torch.zeros(2, 4, 5, 7)}, r"k has shape \(2, 4, 5, 7\), expected that of q, \(2, 4, 5, 6\)"),
        (
            {"v": torch.zeros(2, 4, 5, 6).double()},
            "v is torch.float64, expected the dtype of q, torch.float32",
        ),
        ({"v": torch.zeros(2, 4, 5, 6, device="meta")}, "v is on meta, expected the device of q, cpu"),
        ({"kernel_size": 4}, "kernel_size is 4, expected an odd positive number or two"),
        ({"kernel_size": (3, 0)}, r"kernel_size is \(3, 0\), expected an odd positive number or two"),
        ({"kernel_size": (3, 3, 3)}, "expected an odd positive number or two"),
        ({"dilation": 0}, "dilation is 0, expected a positive number"),
        ({"num_heads": 3}, "num_heads is 3, expected a positive divisor of C = 4"),
        ({"num_heads": -2}, "num_heads is -2, expected a positive divisor of C = 4"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_attention(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "column", "dilated"])
def test_opcheck(name: str, backend: str) -> None:
    shape = SHAPES[name]
    inputs = make_inputs(shape, torch.float64)
    size = shape.kernel_size
    sizes = [size, size] if isinstance(size, int) else list(size)
    args = (*(inputs[n].requires_grad_() for n in "qkv"), sizes, shape.dilation, 0.5, shape.num_heads)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.local_attention.default, args)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 8, H, W)
        return x + local_attention(*self.qkv(x).chunk(3, 1), kernel_size=3, scale=0.5, num_heads=2)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    block, x = _Block(), image((2, 8, 5, 7))
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for module in (block, compiled):
        block.zero_grad()
        out = module(x)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in block.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    block, path = _Block().eval(), tmp_path / "block.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            block, (image((2, 8, 5, 7)),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 8, 5, 7), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, block(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_counted() -> None:
    inputs = make_inputs(SHAPES["dilated"])
    with FlopCounterMode(display=False) as counter:
        local_attention(**inputs)
    # the two products of a window of 9, as matrix products: (1, 4) by (4, 9) and (1, 9) by (9, 4) a query and head
    query, window = torch.zeros(180, 1, 4), torch.zeros(180, 4, 9)
    with FlopCounterMode(display=False) as products:
        torch.bmm(torch.bmm(query, window), window.transpose(1, 2))
    assert counter.get_total_flops() == products.get_total_flops() == 4 * 8 * 90 * 9


def test_autocast_casts_the_inputs() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out = local_attention(**inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), local_attention(**inputs), rtol=2e-2, atol=2e-2)


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(local_attention, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(local_attention, make_inputs(shape, dtype, DEVICE), "triton", use_backend)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_unfold_formulation(shape: Shape) -> None:
    inputs = make_inputs(shape, torch.float64)
    ours = outputs_and_gradients(local_attention, inputs)
    theirs = outputs_and_gradients(unfold_attention, inputs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = make_inputs(Shape(1, 4, 3, 4, num_heads=2), torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    options = {k: v for k, v in inputs.items() if k not in names}

    def call(*tensors: Tensor) -> Tensor:
        return local_attention(**dict(zip(names, tensors, strict=True)), **options)

    with use_backend(backend):
        assert torch.autograd.gradcheck(call, [inputs[k].requires_grad_() for k in names])


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(Shape(1, 4, 3, 4, num_heads=2))
    q = inputs.pop("q").requires_grad_()
    (grad,) = torch.autograd.grad(local_attention(q, **inputs).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_every_backend_gives_its_reason() -> None:
    for backend in operators["local_attention"].backends:
        reason = backend.why_not()
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = (
        make_inputs(Shape(2, 6, 33, 18, kernel_size=5, num_heads=2)),
        torch.get_num_threads(),
        [],
    )
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(local_attention, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@needs_extension
def test_eight_threads_at_once() -> None:
    calls = [make_inputs(Shape(1, 4, 3, 4, num_heads=2), seed=i) for i in range(8)]
    expected = [outputs_and_gradients(local_attention, inputs) for inputs in calls]
    results: list[dict[str, Tensor]] = [{}] * 8

    def work(i: int) -> None:
        for _ in range(10):
            results[i] = outputs_and_gradients(local_attention, calls[i])

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
from vitzoo.kernels.local_attention import local_attention
from vitzoo.kernels.local_attention.inputs import SHAPES, make_inputs
from vitzoo.testing import outputs_and_gradients
results = []
for shape in SHAPES.values():
    results += [float(x.double().norm()) for x in outputs_and_gradients(local_attention, make_inputs(shape)).values()]
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
