"""The four-direction scan: every backend against its parts, the float64 reference and the rules of torch."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.kernels.common import native, scan_support
from vitzoo.kernels.common.backends import BackendError, operators, use_backend
from vitzoo.kernels.cross_selective_scan import cross_selective_scan, cross_selective_scan_flops
from vitzoo.kernels.cross_selective_scan.inputs import SHAPES, Shape, make_inputs
from vitzoo.kernels.selective_scan import selective_scan_flops
from vitzoo.testing import FLOORS, assert_backend_close, gpu_or_cpu, image, outputs_and_gradients

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DEVICE = gpu_or_cpu()[-1]
NAMES = [b.name for b in operators["cross_selective_scan"].backends]
BACKENDS = ["reference", *([pytest.param("cpu", marks=needs_extension)] if "cpu" in NAMES else [])]


def _pixel_by_pixel(**k: Any) -> Tensor:
    """Walk every route over the pixels, one step after the other."""
    x, A = k["x"], k["A"]
    batch, dim, height, width = x.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    total: dict[tuple[int, int], Tensor] = {}
    for r, route in enumerate((rows, columns, rows[::-1], columns[::-1])):
        h = x.new_zeros(batch, dim, A.shape[2])
        for i, j in route:
            step = k["delta"][:, r, :, i, j]
            if k["delta_bias"] is not None:
                step = step + k["delta_bias"][r]
            step = F.softplus(step) if k["delta_softplus"] else step
            u = x[:, :, i, j]
            h = torch.exp(step[..., None] * A[r]) * h + (step * u)[..., None] * k["B"][:, r, None, :, i, j]
            y = (h * k["C"][:, r, None, :, i, j]).sum(-1)
            y = y if k["D"] is None else y + k["D"][r] * u
            total[i, j] = total[i, j] + y if (i, j) in total else y
    return torch.stack([total[p] for p in rows], dim=-1).unflatten(-1, (height, width))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "pixel", "row", "plain", "odd"])
def test_equals_four_walks_over_the_map(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    expected = outputs_and_gradients(_pixel_by_pixel, inputs)
    with use_backend(backend):
        found = outputs_and_gradients(cross_selective_scan, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backends_are_as_close_as_the_reference(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    assert_backend_close(cross_selective_scan, make_inputs(shape, dtype), backend, use_backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    strided = {
        k: v.movedim(-3, -1).contiguous().movedim(-1, -3) if isinstance(v, Tensor) and v.ndim > 3 else v
        for k, v in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        torch.testing.assert_close(
            cross_selective_scan(**strided), cross_selective_scan(**inputs), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "height"])
def test_empty_inputs(backend: str, empty: str) -> None:
    shape = Shape(**{"batch": 2, "dim": 4, "height": 5, "width": 2, "dstate": 3, empty: 0})
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in make_inputs(shape).items()}
    with use_backend(backend):
        out = cross_selective_scan(**inputs)
        out.sum().backward()
    assert out.shape == inputs["x"].shape
    assert not inputs["A"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(2, 12, 9, 7, 4), dtype)
    inputs["x"] = inputs["x"] / inputs["x"].abs().max() * 50
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = cross_selective_scan(**leaves)
        (out.float() * 1e-3).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 6, 5, 4, 3)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 5, 4)}, r"x has shape \(6, 5, 4\), expected \(B, D, H, W\)"),
        ({"A": torch.zeros(24, 3)}, r"A has shape \(24, 3\), expected \(4, D, N\) = \(4, 6, N\)"),
        ({"delta": torch.zeros(2, 24, 5, 4)}, r"delta has shape .*, expected \(B, 4, D, H, W\)"),
        (
            {"B": torch.zeros(2, 4, 2, 5, 4)},
            r"B has shape .*, expected \(B, 4, N, H, W\) = \(2, 4, 3, 5, 4\)",
        ),
        ({"C": torch.zeros(2, 4, 3, 20)}, r"C has shape \(2, 4, 3, 20\)"),
        ({"D": torch.zeros(24)}, r"D has shape \(24,\), expected \(4, D\) = \(4, 6\)"),
        ({"delta_bias": torch.zeros(6)}, r"delta_bias has shape \(6,\)"),
        ({"x": torch.zeros(2, 6, 5, 4).int()}, "x is torch.int32, expected a real floating-point"),
        ({"A": torch.zeros(4, 6, 3, device="meta")}, "A is on meta, expected the device of x"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_selective_scan(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "plain"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.cross_selective_scan.default, tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = make_inputs(Shape(2, 3, 2, 3, 2), torch.float64)
    softplus = inputs.pop("delta_softplus")
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *tensors: cross_selective_scan(*tensors, softplus),
            [x.requires_grad_() for x in inputs.values()],
        )


@needs_extension
@pytest.mark.parametrize("threads", [1, 8])
def test_gradcheck_over_pieces_of_the_tokens(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_support, "LONG", 257)
    inputs, before = make_inputs(Shape(1, 1, 7, 37, 1), torch.float64), torch.get_num_threads()
    inputs["A"] = 0.1 * inputs["A"]  # slow decays, so that a piece feels the one before
    softplus = inputs.pop("delta_softplus")
    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"):
            assert torch.autograd.gradcheck(
                lambda *tensors: cross_selective_scan(*tensors, softplus),
                [x.requires_grad_() for x in inputs.values()],
            )
    finally:
        torch.set_num_threads(before)


class _SS2D(nn.Module):
    """The scan as VMamba uses it, in small: pointwise projections of the map, then four routes."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(4, 8, 2) - 0.1)
        self.D = nn.Parameter(torch.ones(4, 8))
        self.bias = nn.Parameter(torch.zeros(4, 8))
        self.project = nn.Conv2d(8, 4 * (8 + 4), 1)

    def forward(self, x: Tensor) -> Tensor:
        delta, b, c = self.project(x).unflatten(1, (4, 12)).split((8, 2, 2), dim=2)
        return cross_selective_scan(x, delta, self.A, b, c, self.D, self.bias, True)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    module, x = _SS2D(), image((2, 8, 3, 5))
    torch.compiler.reset()
    grads = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_one_onnx_scan(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module, path = _SS2D().eval(), tmp_path / "ss2d.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            (image((2, 8, 3, 5)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    assert [n.op_type for n in program.model.graph].count("Scan") == 1
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 8, 3, 5), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, module(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_counted() -> None:
    shape = Shape(2, 6, 5, 4, 3, has_delta_bias=False, delta_softplus=False)
    with FlopCounterMode(display=False) as counter:
        cross_selective_scan(**make_inputs(shape))
    pixels = 2 * 6 * 5 * 4
    assert counter.get_total_flops() == 4 * selective_scan_flops(2, 6, 20, 3, has_D=True) + 3 * pixels
    assert cross_selective_scan_flops(2, 6, 20, 3, convention="paper") == 4 * 9 * 3 * pixels


def test_autocast_keeps_the_state_wide() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out = cross_selective_scan(**inputs)
    torch.testing.assert_close(out, cross_selective_scan(**inputs), rtol=2e-2, atol=2e-2)


# With chunks of 16 tokens, so that what enters them is tested too.
CHUNKED = {
    "odd": Shape(2, 5, 7, 6, 2),
    "plain": Shape(1, 3, 5, 7, 1, has_D=False, has_delta_bias=False, delta_softplus=False),
}


@pytest.fixture
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scan_triton = pytest.importorskip("vitzoo.kernels.common.scan_triton", exc_type=ImportError)
    monkeypatch.setattr(scan_triton, "tile", lambda *args: (4, 16))


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CHUNKED), ("plain", torch.bfloat16), ("plain", torch.float16)],
    ids=str,
)
def test_triton_chunks_join(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(CHUNKED[name], dtype, DEVICE)
    assert_backend_close(cross_selective_scan, inputs, "triton", use_backend)


@needs_triton
@pytest.mark.parametrize("name", ["tiny", "pixel", "row"])
def test_triton_is_as_close_as_the_reference(name: str) -> None:
    assert_backend_close(
        cross_selective_scan, make_inputs(SHAPES[name], device=DEVICE), "triton", use_backend
    )


@needs_triton
def test_triton_refuses_float64_with_the_reason() -> None:
    inputs = make_inputs(SHAPES["tiny"], torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=r"x is torch\.float64, not float32, bfloat16"),
    ):
        cross_selective_scan(**inputs)


# opcheck itself looks at the gradient of clones
@needs_triton
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_triton_opcheck() -> None:
    inputs = make_inputs(SHAPES["tiny"], device=DEVICE)
    values = tuple(v.requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values())
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.vitzoo.cross_selective_scan.default, values)
