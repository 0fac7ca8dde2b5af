"""Attention with scores: every backend against the reference, and against PyTorch's attention."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.benchmark.flop_formulas import kind
from vitzoo.kernels.attention_with_scores import attention_with_scores
from vitzoo.kernels.attention_with_scores.inputs import BASELINES, SHAPES, Shape, make_inputs
from vitzoo.kernels.attention_with_scores.reference import attention_with_scores_reference
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.testing import FLOORS, assert_backend_close, image, relative_difference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]

TRITON_SHAPES = {k: v for k, v in SHAPES.items() if k != "long"}


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(attention_with_scores, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
def test_triton_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, DEVICE)
    assert_backend_close(attention_with_scores, inputs, "triton", use_backend)


@needs_triton
def test_triton_takes_no_float64() -> None:
    inputs = make_inputs(next(iter(SHAPES.values())), torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="float64, not float32, bfloat16 or float16"),
    ):
        attention_with_scores(**inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_pytorchs_attention_and_its_first_row(backend: str, scale: float | None) -> None:
    inputs = make_inputs(SHAPES["two_blocks"], torch.float64)
    with use_backend(backend):
        out, scores = attention_with_scores(**inputs, scale=scale)
    assert relative_difference(out, F.scaled_dot_product_attention(*inputs.values(), scale=scale)) < 1e-12
    row = inputs["q"][:, :, 0].unsqueeze(2) @ inputs["k"].mT * (scale or 24**-0.5)
    assert relative_difference(scores, row.softmax(-1)[:, :, 0, 1:].mean(1)) < 1e-12
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_benchmarks_baselines_compute_the_same(baseline: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    for ours, expected in zip(
        BASELINES[baseline](**inputs), attention_with_scores_reference(**inputs), strict=True
    ):
        assert relative_difference(ours, expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"])  # views of one projection
    contiguous = {k: v.contiguous() for k, v in inputs.items()}
    last = {k: v.mT.contiguous().mT for k, v in inputs.items()}
    every_other = {k: v.repeat_interleave(2, 2)[:, :, ::2] for k, v in inputs.items()}
    with use_backend(backend):
        expected = attention_with_scores(**contiguous)
        for other in (inputs, last, every_other):
            torch.testing.assert_close(attention_with_scores(**other), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    leaves = {k: v.requires_grad_() for k, v in make_inputs(Shape(0, 2, 5, 4)).items()}
    with use_backend(backend):
        out, scores = attention_with_scores(**leaves)
        (out.sum() + scores.sum()).backward()
    assert out.shape == (0, 2, 5, 4)
    assert scores.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read", ["out", "scores"])
def test_either_output_alone_gives_gradients(backend: str, read: str) -> None:
    inputs = make_inputs(SHAPES["odd"], torch.float64)
    results = []
    for function in (attention_with_scores, attention_with_scores_reference):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        with use_backend(backend):
            out, scores = function(*leaves)
            loss = out.square().sum() if read == "out" else (scores * image(scores.shape).double()).sum()
            results.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for ours, expected in zip(*results, strict=True):
        if float(expected.norm()):
            assert relative_difference(ours, expected) < 1e-12
        else:
            assert not ours.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES["two_blocks"], dtype)
    leaves = {k: (v * 50).requires_grad_() for k, v in inputs.items()}
    with use_backend(backend):
        out, scores = attention_with_scores(**leaves)
        (out.float().sum() + scores.sum()).backward()
    assert torch.isfinite(out).all()
    assert (scores.sum(1) <= 1 + 1e-5).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values())


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 3, 5, 4)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 12)}, r"q has shape \(2, 5, 12\), expected \(B, heads, L, head_dim\)"),
        ({"q": torch.zeros(2, 3, 0, 4)}, r"q has shape \(2, 3, 0, 4\)"),
        ({"q": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, "q is torch.int64, expected a floating"),
        ({"k": torch.zeros(2, 3, 6, 4)}, r"k has shape \(2, 3, 6, 4\), expected that of q"),
        ({"v": torch.zeros(2, 3, 5, 3)}, r"v has shape \(2, 3, 5, 3\), expected that of q"),
        ({"v": torch.zeros(2, 3, 5, 4).half()}, "v is torch.float16, expected the dtype of q"),
        ({"k": torch.zeros(2, 3, 5, 4, device="meta")}, "k is on meta, expected the device of q"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_with_scores(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"], torch.float64)
    tensors = [v.detach().requires_grad_() for v in inputs.values()]
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.attention_with_scores.default, (*tensors, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(1, 2, 4, 3), Shape(2, 1, 3, 2)], ids=["two_heads", "two_images"])
def test_gradcheck(shape: Shape, backend: str) -> None:
    tensors = [v.detach().requires_grad_() for v in make_inputs(shape, torch.float64).values()]
    with use_backend(backend):
        assert torch.autograd.gradcheck(attention_with_scores, tensors)


def test_second_derivatives_are_refused() -> None:
    inputs = _small()
    q = inputs.pop("q").requires_grad_()
    (grad,) = torch.autograd.grad(attention_with_scores(q, **inputs)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, 6, 8)
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out, scores = attention_with_scores(*qkv.unbind(0))
        return out.transpose(1, 2).flatten(2), scores


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    layer, x = _Layer(), image((2, 6, 8))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (layer, compiled):
        layer.zero_grad()
        out, scores = module(x)
        (out.square().sum() + scores.square().sum()).backward()
        grads.append([out, scores, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_onnx_with_any_batch(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer, path = _Layer().eval(), tmp_path / "layer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            layer,
            (image((2, 6, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 6, 8), batch)
        results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            for found, expected in zip(results, layer(x), strict=True):
                np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_references_products() -> None:
    inputs = make_inputs(SHAPES["odd"])
    with FlopCounterMode(display=False) as expected:
        attention_with_scores_reference(**inputs)
    with FlopCounterMode(display=False) as counter:
        attention_with_scores(**inputs)
    assert counter.get_total_flops() == expected.get_total_flops() == 4 * 3 * 17 * 17 * 15
    inputs["q"].requires_grad_()
    out, _ = attention_with_scores(**inputs)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # five products where the forward pass has two
    assert counter.get_total_flops() == 5 * expected.get_total_flops() // 2
    assert kind(torch.ops.vitzoo.attention_with_scores, by_weight=False) == "attention"


def test_autocast_runs_in_its_dtype() -> None:
    layer, x = _Layer(), image((2, 6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, scores = layer(x)
        mixed, _ = attention_with_scores(**_small(k=torch.zeros(2, 3, 5, 4).bfloat16()))
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert relative_difference(out, layer(x)[0]) < 2e-2


_FORCED = """
import torch
from vitzoo.kernels.common import native
from vitzoo.kernels.attention_with_scores import attention_with_scores
from vitzoo.kernels.attention_with_scores.inputs import SHAPES, make_inputs
from vitzoo.testing import outputs_and_gradients
print(native.cpu_isa())
for name in ("odd", "two_blocks"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        results = outputs_and_gradients(attention_with_scores, make_inputs(SHAPES[name], dtype))
        print(*(float(x.double().norm()) for x in results.values()))
"""


@needs_extension
def test_every_instruction_set_of_this_cpu_agrees() -> None:
    known, results = ("baseline", "avx2", "avx512"), {}
    for isa in known[: known.index(native.cpu_isa()) + 1]:
        done = subprocess.run(
            [sys.executable, "-c", _FORCED],
            capture_output=True,
            text=True,
            env={**os.environ, "VITZOO_CPU_ISA": isa},
        )
        assert done.returncode == 0, done.stderr
        name, *lines = done.stdout.splitlines()
        assert name == isa
        results[isa] = [[float(x) for x in line.split()] for line in lines]
    for lines in results.values():
        for found, expected in zip(lines, results["baseline"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3)


@needs_extension
def test_memory_does_not_grow_with_the_matrix() -> None:
    inputs = make_inputs(Shape(1, 1, 1 << 15, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with use_backend("cpu"):
        out, scores = attention_with_scores(**inputs)
    assert torch.isfinite(out).all()
    assert float(scores.sum()) < 1
    # in KiB; the matrix would be 4 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18
