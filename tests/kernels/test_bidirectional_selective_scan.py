"""The bidirectional scan: every backend against two plain scans, the float64 reference and the rules of torch."""

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
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.kernels.bidirectional_selective_scan import bidirectional_selective_scan
from vitzoo.kernels.bidirectional_selective_scan.flops import bidirectional_selective_scan_flops
from vitzoo.kernels.bidirectional_selective_scan.inputs import SHAPES, Shape, make_inputs
from vitzoo.kernels.bidirectional_selective_scan.reference import bidirectional_selective_scan_reference
from vitzoo.kernels.common import native, scan_support
from vitzoo.kernels.common.backends import BackendError, operators, use_backend
from vitzoo.kernels.selective_scan import selective_scan, selective_scan_flops
from vitzoo.testing import FLOORS, assert_backend_close, gpu_or_cpu, image, outputs_and_gradients

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DEVICE = gpu_or_cpu()[-1]
NAMES = [b.name for b in operators["bidirectional_selective_scan"].backends]
BACKENDS = ["reference", *([pytest.param("cpu", marks=needs_extension)] if "cpu" in NAMES else [])]


def _by_flips(**k: Any) -> Tensor:
    """Two scans as Vim's authors run them: the second on flipped copies, each gated by itself."""
    flip = lambda x: x.flip(-1) if x is not None and x.ndim > 2 else x  # noqa: E731
    ahead = selective_scan(
        k["u"], k["delta"], k["A"], k["B"], k["C"], k["D"], k["z"], k["delta_bias"], k["delta_softplus"]
    )
    back = selective_scan(
        flip(k["u"] if k["u_b"] is None else k["u_b"]),
        flip(k["delta_b"]),
        k["A_b"],
        flip(k["B_b"]),
        flip(k["C_b"]),
        k["D_b"],
        flip(k["z"]),
        k["delta_bias_b"],
        k["delta_softplus"],
    )
    return ahead + back.flip(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_two_scans_with_flips(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    with use_backend("reference"):
        expected = outputs_and_gradients(_by_flips, inputs)
    with use_backend(backend):
        found = outputs_and_gradients(bidirectional_selective_scan, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backends_are_as_close_as_the_reference(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    assert_backend_close(bidirectional_selective_scan, make_inputs(shape, dtype), backend, use_backend)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(
    "forms", [(0, 2), (-1, 0), (2, -1)], ids=["shared_groups", "constant_shared", "groups_constant"]
)
def test_b_and_c_in_different_forms(forms: tuple[int, int], backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    inputs = make_inputs(Shape(2, 6, 5, 3, groups=forms[0]), device=device)
    others = make_inputs(Shape(2, 6, 5, 3, groups=forms[1]), device=device)
    inputs |= {name: others[name] for name in ("C", "C_b")}
    assert_backend_close(bidirectional_selective_scan, inputs, backend, use_backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    strided = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in inputs.items()
    }
    with use_backend(backend):
        torch.testing.assert_close(
            bidirectional_selective_scan(**strided),
            bidirectional_selective_scan(**inputs),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "seqlen"])
def test_empty_inputs(backend: str, empty: str) -> None:
    shape = Shape(**{"batch": 2, "dim": 4, "seqlen": 5, "dstate": 3, empty: 0})
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in make_inputs(shape).items()}
    with use_backend(backend):
        out = bidirectional_selective_scan(**inputs)
        out.sum().backward()
    assert out.shape == inputs["u"].shape
    assert not inputs["A_b"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(2, 24, 61, 16), torch.float32)
    for name, largest in (("u", 50), ("u_b", 50), ("z", 120)):
        inputs[name] = inputs[name] / inputs[name].abs().max() * largest
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = bidirectional_selective_scan(**leaves)
        (out.float() * 1e-3).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 6, 5, 3)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(6, 5)}, r"u has shape \(6, 5\), expected \(B, D, L\)"),
        ({"delta": torch.zeros(2, 6, 4)}, r"delta has shape \(2, 6, 4\), expected \(B, D, L\) = \(2, 6, 5\)"),
        ({"delta_b": torch.zeros(2, 6, 4)}, r"delta_b has shape \(2, 6, 4\), expected that of delta"),
        ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\), expected \(D, N\) = \(6, N\)"),
        ({"A_b": torch.zeros(6, 4)}, r"A_b has shape \(6, 4\), expected that of A, \(6, 3\)"),
        ({"B": torch.zeros(2, 4, 5)}, r"B has shape \(2, 4, 5\), expected \(B, N, L\) = \(2, 3, 5\)"),
        ({"C": torch.zeros(2, 4, 3, 5)}, r"C has shape .* G a divisor of 6"),
        ({"C_b": torch.zeros(6, 3)}, r"C_b has shape \(6, 3\), expected that of C"),
        ({"D_b": None}, "D is given and D_b is None, expected both or neither"),
        ({"delta_bias": None}, "delta_bias_b is given and delta_bias is None"),
        ({"D": torch.zeros(5), "D_b": torch.zeros(5)}, r"D has shape \(5,\), expected \(D,\) = \(6,\)"),
        ({"z": torch.zeros(2, 6, 6)}, r"z has shape \(2, 6, 6\)"),
        ({"u_b": torch.zeros(2, 5, 5)}, r"u_b has shape \(2, 5, 5\)"),
        ({"u": torch.zeros(2, 6, 5, dtype=torch.int64)}, "u is torch.int64, expected a real floating-point"),
        ({"A_b": torch.zeros(6, 3, device="meta")}, "A_b is on meta, expected the device of u"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bidirectional_selective_scan(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "groups", "constant", "plain", "shared_input"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    op = torch.ops.vitzoo.bidirectional_selective_scan.default
    with use_backend(backend):
        torch.library.opcheck(op, tuple(inputs[argument.name] for argument in op._schema.arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 2, 4, 2), Shape(2, 4, 3, 2, groups=2, has_u_b=False), Shape(1, 3, 3, 2, groups=-1)],
    ids=["", "groups", "const"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    options = {k: v for k, v in inputs.items() if k not in names}

    def scan(*tensors: Tensor) -> Any:
        return bidirectional_selective_scan(**dict(zip(names, tensors, strict=True)), **options)

    with use_backend(backend):
        assert torch.autograd.gradcheck(scan, [inputs[k].double().requires_grad_() for k in names])


@needs_extension
@pytest.mark.parametrize("threads", [1, 8])
def test_gradcheck_over_pieces_of_the_tokens(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_support, "LONG", 257)
    inputs, before = make_inputs(Shape(1, 1, 259, 1), torch.float64), torch.get_num_threads()
    # slow decays, so that a piece feels the one before
    inputs |= {name: 0.1 * inputs[name] for name in ("A", "A_b")}
    softplus = inputs.pop("delta_softplus")
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items()}
    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"):
            assert torch.autograd.gradcheck(
                lambda *tensors: bidirectional_selective_scan(
                    **dict(zip(leaves, tensors, strict=True)), delta_softplus=softplus
                ),
                tuple(leaves.values()),
            )
    finally:
        torch.set_num_threads(before)


class _Mixer(nn.Module):
    """The scan as Vim uses it, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(2, 8, 4) - 0.1)
        self.D = nn.Parameter(torch.ones(2, 8))
        self.project = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        u = x.transpose(1, 2)
        b, b_b, c, c_b = self.project(x).transpose(1, 2).chunk(4, dim=1)
        step, rate, skip = u.abs(), self.A, self.D
        ahead, back = (step, rate[0], b, c, skip[0], None), (2 * step, rate[1], b_b, c_b, skip[1], None)
        return bidirectional_selective_scan(u, u, *ahead, *back, u.sin(), delta_softplus=True)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    mixer, x = _Mixer(), image((2, 9, 8))
    torch.compiler.reset()
    grads = []
    for module in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        mixer.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in mixer.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("form", ["shared", "groups", "constant"])
def test_export_form_is_the_reference(form: str) -> None:
    from vitzoo.kernels.bidirectional_selective_scan.onnx import bidirectional_selective_scan_export

    shape = Shape(2, 6, 5, 3, groups={"shared": 0, "groups": 2, "constant": -1}[form])
    inputs = make_inputs(shape)
    torch.testing.assert_close(
        bidirectional_selective_scan_export(**inputs), bidirectional_selective_scan_reference(**inputs)
    )


def test_exports_to_one_onnx_scan(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    mixer, path = _Mixer().eval(), tmp_path / "mixer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            mixer,
            (image((2, 9, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    assert [n.op_type for n in program.model.graph].count("Scan") == 1
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 9, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, mixer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_counted() -> None:
    shape = Shape(2, 6, 5, 3, has_delta_bias=False, delta_softplus=False)
    tokens = 2 * 6 * 5
    # two scans with their skip terms, the sum of the two, and a gate (sigmoid 3, two products)
    expected = 2 * selective_scan_flops(2, 6, 5, 3, has_D=True) + tokens + 5 * tokens
    with FlopCounterMode(display=False) as counter:
        bidirectional_selective_scan(**make_inputs(shape))
    assert counter.get_total_flops() == expected
    paper = bidirectional_selective_scan_flops(2, 6, 5, 3, has_D=True, has_z=True, convention="paper")
    assert paper == 2 * (9 * 3 * tokens + tokens) + tokens


def test_autocast_keeps_the_state_wide() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out = bidirectional_selective_scan(**inputs)
    torch.testing.assert_close(out, bidirectional_selective_scan(**inputs), rtol=2e-2, atol=2e-2)


# With chunks of 16 tokens, so that what enters them is tested too.
CHUNKED = {
    "two_walks": Shape(1, 6, 35, 2),
    "shared_input": Shape(2, 5, 33, 1, has_u_b=False),
    "groups": Shape(1, 8, 33, 2, groups=2, has_z=False),
    "constant": Shape(1, 5, 21, 2, groups=-1),
}


@pytest.fixture
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    scan_triton = pytest.importorskip("vitzoo.kernels.common.scan_triton", exc_type=ImportError)
    monkeypatch.setattr(scan_triton, "tile", lambda *args: (4, 16))


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CHUNKED), ("groups", torch.bfloat16), ("groups", torch.float16)],
    ids=str,
)
def test_triton_chunks_join(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(CHUNKED[name], dtype, DEVICE)
    assert_backend_close(bidirectional_selective_scan, inputs, "triton", use_backend)


@needs_triton
@pytest.mark.parametrize("name", ["tiny", "one_token", "plain"])
def test_triton_is_as_close_as_the_reference(name: str) -> None:
    assert_backend_close(
        bidirectional_selective_scan, make_inputs(SHAPES[name], device=DEVICE), "triton", use_backend
    )


@needs_triton
def test_triton_refuses_float64_with_the_reason() -> None:
    inputs = make_inputs(SHAPES["tiny"], torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=r"u is torch\.float64, not float32, bfloat16"),
    ):
        bidirectional_selective_scan(**inputs)


# opcheck itself looks at the gradient of clones
@needs_triton
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_triton_opcheck() -> None:
    inputs = make_inputs(SHAPES["tiny"], device=DEVICE)
    values = tuple(v.requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values())
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.vitzoo.bidirectional_selective_scan.default, values)
