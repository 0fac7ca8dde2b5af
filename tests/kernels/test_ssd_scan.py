"""The scan of Mamba-2: every backend against the goldens, the float64 reference and the rules of torch."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vitzoo.benchmark.flop_formulas import SCAN_CONVENTIONS, formulas, kind
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.ssd_scan import ssd_scan
from vitzoo.kernels.ssd_scan.inputs import SHAPES, Shape, make_inputs
from vitzoo.kernels.ssd_scan.reference import ssd_scan_chunked, ssd_scan_reference
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_tensor,
    image,
    load_golden,
    outputs_and_gradients,
)

GOLDEN = {c["id"]: c for c in load_golden("ops/ssd_scan")["cases"]}
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("triton", marks=needs_triton),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, backend: str) -> None:
    golden = GOLDEN[case]
    inputs = {k: golden_tensor(v).to(_device(backend)).requires_grad_() for k, v in golden["inputs"].items()}
    with use_backend(backend):
        out = ssd_scan(**inputs, **golden["options"])
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    for name, recorded in golden["grads"].items():
        assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype) | {"return_final_states": True}
    assert_backend_close(ssd_scan, inputs, "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "one_token", "one_state", "plain", "odd", "two_chunks"])
def test_triton_is_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[name], dtype, DEVICE) | {"return_final_states": True}
    assert_backend_close(ssd_scan, inputs, "triton", use_backend)


def test_final_states_go_on_where_the_scan_stopped() -> None:
    # the states after all tokens are those after the first part, decayed over the second, plus the second's own
    inputs = make_inputs(Shape(2, 90, 3, 5, 4, has_dt_bias=False, dt_softplus=False, skip=0), torch.float64)
    step = {k: inputs[k] for k in ("x", "dt", "B", "C")}
    rest = {k: v for k, v in inputs.items() if k not in step}

    def states(part: slice) -> Tensor:
        cut = {k: v[:, part] for k, v in step.items()}
        return ssd_scan(**cut, **rest, return_final_states=True)[1]

    decay = (inputs["dt"][:, 70:] * inputs["A"]).sum(1).exp()[:, :, None, None]
    expected = decay * states(slice(0, 70)) + states(slice(70, 90))
    torch.testing.assert_close(states(slice(0, 90)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunked_form_is_the_recurrence(chunk: int) -> None:
    inputs = make_inputs(SHAPES["odd"], torch.float64)
    ours, theirs = ssd_scan_chunked(**inputs, chunk=chunk), ssd_scan_reference(**inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(Shape(3, 21, 4, 6, 5, groups=2, has_z=True), device=_device(backend))
    strided = {
        k: v.transpose(1, -1).contiguous().transpose(1, -1) if isinstance(v, Tensor) and v.ndim > 2 else v
        for k, v in inputs.items()
    }
    # a slice of a wider projection, as Mamba-2 cuts its input: rows are contiguous, tokens are not
    wide = torch.cat([inputs["B"], inputs["C"]], dim=3)
    sliced = {**inputs, "B": wide[..., :5], "C": wide[..., 5:]}
    assert not strided["x"].is_contiguous()
    assert not sliced["B"].is_contiguous()
    with use_backend(backend):
        expected = outputs_and_gradients(ssd_scan, inputs)
        for other in (strided, sliced):
            found = outputs_and_gradients(ssd_scan, other)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "seqlen"])
def test_empty_inputs(backend: str, empty: str) -> None:
    shape = Shape(**{"batch": 2, "seqlen": 5, "heads": 2, "headdim": 3, "dstate": 4, empty: 0})
    inputs = make_inputs(shape, device=_device(backend))
    with use_backend(backend):
        found = outputs_and_gradients(ssd_scan, inputs | {"return_final_states": True})
    assert found["output 0"].shape == inputs["x"].shape
    assert found["output 1"].shape == (shape.batch, 2, 3, 4)
    assert not found["output 1"].any()
    assert not found["gradient of A"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    # |x| up to 50, |z| up to 120, steps from 0 to 40
    inputs = make_inputs(Shape(1, 67, 2, 8, 4, has_z=True), dtype, _device(backend))
    inputs["x"], inputs["z"] = (inputs["x"] * 15).clamp(-50, 50), (inputs["z"] * 40).clamp(-120, 120)
    inputs["dt"] = inputs["dt"] * 10
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = ssd_scan(**leaves)
        (out.float() * 1e-4).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


@needs_extension
@pytest.mark.parametrize("rate", [1e-4, 0.1, 5.0, 200.0])
def test_decays_are_right_from_slow_to_vanishing(rate: float) -> None:
    # one impulse; two chunks later its trace is the product of the decays since
    dt = torch.rand(1, 140, 3, generator=torch.Generator().manual_seed(0))
    x, ones = torch.zeros(1, 140, 3, 1), torch.ones(1, 140, 1, 1)
    x[:, 0] = 1
    with use_backend("cpu"):
        out = ssd_scan(x, dt, torch.full((3,), -rate), ones, ones)[..., 0]
    log_decay = -rate * (dt.double().cumsum(1) - dt[:, :1].double())
    torch.testing.assert_close(out.double(), log_decay.exp() * dt[:, :1], rtol=2e-5, atol=1e-30)


@needs_extension
def test_growing_states_overflow_where_the_reference_does() -> None:
    inputs = make_inputs(Shape(2, 80, 3, 4, 5, dt_softplus=False, has_dt_bias=False))
    inputs["A"] = torch.tensor([0.5, 6.0, 40.0])
    out, reference = ssd_scan(**inputs), ssd_scan_reference(**inputs)[0]
    assert not reference.isfinite().all()
    assert torch.equal(out.isfinite()[:, :, 0], reference.isfinite()[:, :, 0])
    finite = reference.isfinite()
    assert out[:, :5].isfinite().sum() >= finite[:, :5].sum() - 4
    torch.testing.assert_close(out[:, :, 0], reference[:, :, 0], rtol=1e-4, atol=1e-3)


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 5, 6, 4, 3, groups=2, has_z=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 24)}, r"x has shape \(2, 5, 24\), expected \(B, L, heads, headdim\)"),
        ({"x": torch.zeros(2, 5, 6, 0)}, r"x has shape \(2, 5, 6, 0\), .* positive heads and headdim"),
        ({"dt": torch.zeros(2, 5, 4)}, r"dt has shape \(2, 5, 4\), expected \(B, L, heads\) = \(2, 5, 6\)"),
        ({"A": torch.zeros(6, 3)}, r"A has shape \(6, 3\), expected \(heads,\) = \(6,\)"),
        ({"B": torch.zeros(2, 5, 4, 3)}, r"B has shape \(2, 5, 4, 3\) .* G a divisor of 6"),
        ({"C": torch.zeros(2, 5, 2, 4)}, r"and C \(2, 5, 2, 4\), expected both \(B, L, G, N\)"),
        ({"D": torch.zeros(4)}, r"D has shape \(4,\), expected .* = \(6,\) or \(6, 4\)"),
        ({"z": torch.zeros(2, 5, 6, 5)}, r"z has shape \(2, 5, 6, 5\)"),
        ({"dt_bias": torch.zeros(5)}, r"dt_bias has shape \(5,\), expected \(heads,\) = \(6,\)"),
        ({"x": torch.zeros(2, 5, 6, 4, dtype=torch.int32)}, "x is torch.int32, expected a floating-point"),
        ({"A": torch.zeros(6, device="meta")}, "A is on meta, expected the device of x"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd_scan(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", ["tiny", "one_state", "plain"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.ssd_scan.default, tuple(inputs.get(n) for n in NAMES))


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 4, 2, 2, 2, has_z=True, skip=2), Shape(2, 3, 4, 1, 2, groups=2)],
    ids=["gated", "groups"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    softplus = inputs.pop("dt_softplus")
    names = [k for k, v in inputs.items() if v is not None]

    def scan(*tensors: Tensor) -> Any:
        return ssd_scan(
            **dict(zip(names, tensors, strict=True)), dt_softplus=softplus, return_final_states=True
        )

    with use_backend(backend):
        assert torch.autograd.gradcheck(scan, [inputs[k].requires_grad_() for k in names])


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(4))
        self.D, self.dt_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.project = nn.Linear(8, 8 + 3 + 3 + 4)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        u, b, c, dt = self.project(x).split([8, 3, 3, 4], dim=-1)
        u = u.unflatten(-1, (4, 2))
        a = -torch.exp(self.A_log)
        b, c = b.unsqueeze(2), c.unsqueeze(2)
        return ssd_scan(u, dt, a, b, c, self.D, u, self.dt_bias, dt_softplus=True).flatten(2)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    mixer, x = _Mixer(), image((2, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (mixer, compiled):
        mixer.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in mixer.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("seqlen", [9, 150])
def test_exports_to_onnx_without_a_loop(seqlen: int, tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    mixer, path = _Mixer().eval(), tmp_path / "mixer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            mixer,
            (image((2, seqlen, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    assert not {"Scan", "Loop"} & {n.op_type for n in program.model.graph}
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, seqlen, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, mixer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_recurrence() -> None:
    shape = SHAPES["plain"]
    inputs = make_inputs(shape)
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    # 2 products a token and head, K x V multiply-adds each, 2 FLOPs a multiply-add
    forward = 2 * 2 * (2 * 19 * 6) * (4 * 5)
    with FlopCounterMode(display=False) as counter:
        out = ssd_scan(**leaves)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward // 2 * 5
    # the reference's only matrix product, y = S C, is half of it
    with FlopCounterMode(display=False) as counter:
        ssd_scan_reference(**inputs)
    assert 2 * counter.get_total_flops() == forward


@pytest.mark.parametrize("convention", SCAN_CONVENTIONS)
def test_it_is_a_scan_with_one_count_in_both_conventions(convention: str) -> None:
    packet = torch.ops.vitzoo.ssd_scan
    assert kind(packet, by_weight=False) == "scan"
    inputs = make_inputs(SHAPES["plain"])
    count = formulas(convention)[packet](*(inputs.get(n) for n in NAMES), out_val=None)
    assert count == 4 * (2 * 19 * 6) * (4 * 5)


def test_autocast_keeps_the_state_wide() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out, states = ssd_scan(**{**inputs, "dt": inputs["dt"].bfloat16()}, return_final_states=True)
    expected = ssd_scan(**inputs)
    assert states.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    for name in ("two_chunks", "many_heads"):
        inputs, results = make_inputs(SHAPES[name]), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(outputs_and_gradients(ssd_scan, inputs))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(results[0][k], other[k]) for k in other)
