"""Pooled attention: every backend against the reference, and against PyTorch's attention."""

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
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.kernels.pooled_attention import pooled_attention
from vitzoo.kernels.pooled_attention.inputs import BASELINES, SHAPES, Shape, make_inputs
from vitzoo.kernels.pooled_attention.reference import pooled_attention_reference
from vitzoo.testing import FLOORS, assert_backend_close, image, relative_difference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]

TRITON_SHAPES = {k: v for k, v in SHAPES.items() if k != "many_keys"}


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(pooled_attention, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
def test_triton_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, DEVICE)
    assert_backend_close(pooled_attention, inputs, "triton", use_backend)


@needs_triton
def test_triton_takes_no_float64() -> None:
    inputs = make_inputs(next(iter(SHAPES.values())), torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="float64, not float32, bfloat16 or float16"),
    ):
        pooled_attention(**inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_softmax_attention_of_each_head(backend: str, scale: float | None) -> None:
    inputs = make_inputs(SHAPES["odd"], torch.float64)
    q, kv = inputs["q"].flatten(1, 2), inputs["kv"].flatten(1, 2)
    with use_backend(backend):
        out = pooled_attention(**inputs, scale=scale).flatten(1, 2)
    for head in range(3):
        channels = slice(5 * head, 5 * head + 5)
        k, v = kv[..., :15][..., channels], kv[..., 15:][..., channels]
        weights = (q[..., channels] @ k.mT * (scale or 5**-0.5)).softmax(-1)
        assert relative_difference(out[..., channels], weights @ v) < 1e-12


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_benchmarks_baselines_compute_the_same(baseline: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    assert relative_difference(BASELINES[baseline](**inputs), pooled_attention_reference(**inputs)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    q, kv = inputs["q"], inputs["kv"]

    def channels_first(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    with use_backend(backend):
        expected = pooled_attention(**inputs)
        for a, b in (
            (channels_first(q), channels_first(kv)),
            (q.transpose(1, 2).contiguous().transpose(1, 2), kv.repeat_interleave(2, 2)[:, :, ::2]),
            (torch.cat([q, q], -1)[..., :15], torch.cat([kv, kv], -1)[..., :30]),
        ):
            assert not a.is_contiguous()
            assert not b.is_contiguous()
            torch.testing.assert_close(pooled_attention(a, b, 3), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "height"])
def test_empty_inputs(backend: str, empty: str) -> None:
    sizes = {"batch": 2, "height": 3, "width": 4, "key_height": 2, "key_width": 2}
    inputs = make_inputs(Shape(**{**sizes, empty: 0}, num_heads=2, head_dim=4))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = pooled_attention(**leaves)
        out.sum().backward()
    assert out.shape == inputs["q"].shape
    assert not leaves["kv"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES["two_blocks"], dtype)
    leaves = {k: (v * 50).requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = pooled_attention(**leaves)
        out.float().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


@needs_extension
def test_rising_scores_are_rescaled() -> None:
    # each piece of the keys has a larger maximum than those before it, by more than a float32 exponential holds
    q, kv = torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 400, 2)
    kv[..., 0] = torch.arange(400)
    kv[..., 1] = torch.arange(400) % 7
    exact = pooled_attention_reference(q.double(), kv.double(), 1)
    with use_backend("cpu"):
        assert relative_difference(pooled_attention(q, kv, 1), exact) < 1e-5
        assert relative_difference(pooled_attention(q, kv.flip(2), 1), exact) < 1e-5


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 5, 6, 2, 3, 2, 4)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 30, 8)}, r"q has shape \(2, 30, 8\), expected \(B, H, W, C\)"),
        ({"q": torch.zeros(2, 5, 6, 9)}, r"q has shape .* C a multiple of num_heads 2"),
        ({"q": torch.zeros(2, 5, 6, 8, dtype=torch.int64)}, "q is torch.int64, expected a floating"),
        ({"num_heads": -1}, "num_heads is -1, expected a positive number"),
        ({"kv": torch.zeros(2, 2, 3, 15)}, r"kv has shape .* expected \(B, h, w, 2\*C\) = \(2, h, w, 16\)"),
        ({"kv": torch.zeros(1, 2, 3, 16)}, r"kv has shape \(1, 2, 3, 16\)"),
        ({"kv": torch.zeros(2, 0, 3, 16)}, "expected a map of at least one position"),
        ({"kv": torch.zeros(2, 2, 3, 16).half()}, "kv is torch.float16, expected the dtype of q"),
        ({"kv": torch.zeros(2, 2, 3, 16, device="meta")}, "kv is on meta, expected the device of q"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pooled_attention(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = make_inputs(SHAPES["lofi"], torch.float64)
    q, kv = inputs["q"].requires_grad_(), inputs["kv"].requires_grad_()
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.pooled_attention.default, (q, kv, 2, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [Shape(1, 2, 3, 1, 2, 2, 3), Shape(2, 1, 2, 2, 3, 1, 2)], ids=["", "more_keys"]
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    q, kv = inputs["q"].requires_grad_(), inputs["kv"].requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda q, kv: pooled_attention(q, kv, shape.num_heads), (q, kv))


def test_second_derivatives_are_refused() -> None:
    inputs = _small()
    q = inputs.pop("q").requires_grad_()
    (grad,) = torch.autograd.grad(pooled_attention(q, **inputs).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 6, 8)
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return pooled_attention(self.q(x), self.kv(pooled), 2)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    layer, x = _Layer(), image((2, 4, 6, 8))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (layer, compiled):
        layer.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_onnx_with_any_batch(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer, path = _Layer().eval(), tmp_path / "layer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            layer,
            (image((2, 4, 6, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 4, 6, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, layer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_references_products() -> None:
    inputs = make_inputs(SHAPES["odd"])
    with FlopCounterMode(display=False) as expected:
        pooled_attention_reference(**inputs)
    with FlopCounterMode(display=False) as counter:
        pooled_attention(**inputs)
    assert counter.get_total_flops() == expected.get_total_flops() == 4 * 3 * 35 * 9 * 15
    inputs["q"].requires_grad_()
    out = pooled_attention(**inputs)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # five products where the forward pass has two
    assert counter.get_total_flops() == 5 * expected.get_total_flops() // 2
    assert kind(torch.ops.vitzoo.pooled_attention, by_weight=False) == "attention"


def test_autocast_runs_in_its_dtype() -> None:
    layer, x = _Layer(), image((2, 4, 6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        mixed = pooled_attention(layer.q(x), torch.zeros(2, 2, 3, 16), 2)  # bfloat16 and float32
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert relative_difference(out, layer(x)) < 2e-2


_FORCED = """
import torch
from vitzoo.kernels.common import native
from vitzoo.kernels.pooled_attention import pooled_attention
from vitzoo.kernels.pooled_attention.inputs import SHAPES, make_inputs
from vitzoo.testing import outputs_and_gradients
print(native.cpu_isa())
for name in ("odd", "two_blocks"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        results = outputs_and_gradients(pooled_attention, make_inputs(SHAPES[name], dtype))
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
    inputs = make_inputs(Shape(1, 128, 256, 128, 256, 1, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with use_backend("cpu"):
        out = pooled_attention(**inputs)
    assert torch.isfinite(out).all()
    # in KiB; the matrix of all scores would be 4 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18
