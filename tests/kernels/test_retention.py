"""Retention: every form and backend against the goldens, the float64 reference and the rules of torch."""

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

from vitzoo.benchmark.flop_formulas import kind
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.retention import retention
from vitzoo.kernels.retention.inputs import SHAPES, Shape, make_inputs
from vitzoo.kernels.retention.reference import MODES
from vitzoo.testing import (
    FLOORS,
    assert_backend_close,
    assert_golden,
    golden_tensor,
    image,
    load_golden,
    outputs_and_gradients,
)

GOLDEN = {c["id"]: c for c in load_golden("ops/retention")["cases"]}
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


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, mode: str, backend: str) -> None:
    golden = GOLDEN[case]
    inputs = {k: golden_tensor(v).to(_device(backend)).requires_grad_() for k, v in golden["inputs"].items()}
    options = dict(golden["options"])
    chunk = options.pop("check_chunk")
    with use_backend(backend):
        out, state = retention(**inputs, **options, mode=mode, chunk_size=chunk, return_final_state=True)
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    assert_golden(state, golden["outputs"]["final_state"], 1e-5, "final_state")
    for name, recorded in golden["grads"].items():
        assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype) | {"return_final_state": True}
    assert_backend_close(retention, inputs, "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "one_token", "odd", "two_chunks", "parallel"])
def test_triton_is_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[name], dtype, DEVICE) | {"return_final_state": True}
    assert_backend_close(retention, inputs, "triton", use_backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_gives_the_same_numbers(backend: str) -> None:
    inputs = make_inputs(Shape(1, 71, 2, 6, 5, has_state=True), device=_device(backend))
    with use_backend(backend):
        results = {
            (mode, size): outputs_and_gradients(
                retention, inputs | {"mode": mode, "chunk_size": size, "return_final_state": True}
            )
            for mode, size in (("recurrent", 64), ("parallel", 64), ("chunkwise", 16), ("chunkwise", 64))
        }
    first = results["recurrent", 64]
    assert set(first) == {
        *("output 0", "output 1"),
        *(f"gradient of {k}" for k in ("q", "k", "v", "gammas", "initial_state")),
    }
    for other in results.values():
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_the_state_carries_from_call_to_call(backend: str) -> None:
    inputs = make_inputs(Shape(2, 100, 3, 5, 4, has_state=True), torch.float64)
    rest = {"gammas": inputs["gammas"], "return_final_state": True}
    tokens = {k: inputs[k] for k in ("q", "k", "v")}
    with use_backend(backend):
        whole, end = retention(**tokens, initial_state=inputs["initial_state"], **rest)
        state, outputs = inputs["initial_state"], []
        for part in (slice(0, 70), slice(70, 71), slice(71, 71), slice(71, 100)):
            out, state = retention(**{k: v[:, part] for k, v in tokens.items()}, initial_state=state, **rest)
            outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gammas_of_one_and_nearly_none(backend: str) -> None:
    # 1: a running sum; 1e-30: every token for itself
    inputs = make_inputs(Shape(1, 66, 2, 3, 4), device=_device(backend))
    q, k, v = (inputs[n].double() for n in ("q", "k", "v"))
    with use_backend(backend):
        out = retention(inputs["q"], inputs["k"], inputs["v"], gammas=[1.0, 1e-30], scale=1.0).double()
    state = torch.einsum("blk,blv->blkv", k[:, :, 0], v[:, :, 0]).cumsum(1)
    torch.testing.assert_close(
        out[:, :, 0], torch.einsum("blk,blkv->blv", q[:, :, 0], state), rtol=1e-4, atol=1e-4
    )
    alone = (q[:, :, 1] * k[:, :, 1]).sum(-1, keepdim=True) * v[:, :, 1]
    torch.testing.assert_close(out[:, :, 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(Shape(3, 21, 2, 6, 6), device=_device(backend))
    qkv = torch.stack([inputs[k] for k in ("q", "k", "v")], dim=2)  # as a fused projection gives it
    sliced = inputs | dict(zip(("q", "k", "v"), qkv.unbind(2), strict=True))
    strided = {
        k: v.transpose(1, 3).contiguous().transpose(1, 3) if k in ("q", "k", "v") else v
        for k, v in inputs.items()
    }
    assert not sliced["q"].is_contiguous()
    assert strided["v"].stride(-1) != 1
    with use_backend(backend):
        expected = outputs_and_gradients(retention, inputs)
        for other in (sliced, strided):
            found = outputs_and_gradients(retention, other)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "seqlen"])
def test_empty_inputs(backend: str, empty: str) -> None:
    shape = Shape(**{"batch": 2, "seqlen": 5, "heads": 2, "dk": 3, "dv": 4, "has_state": True, empty: 0})
    inputs = make_inputs(shape, device=_device(backend))
    with use_backend(backend):
        found = outputs_and_gradients(retention, inputs | {"return_final_state": True})
    assert found["output 0"].shape == inputs["v"].shape
    torch.testing.assert_close(found["output 1"], inputs["initial_state"])
    if empty == "seqlen":  # the state passes through, and so does its gradient
        expected = image(inputs["initial_state"].shape, 2)
        torch.testing.assert_close(found["gradient of initial_state"].cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(1, 67, 2, 8, 4, has_state=True), dtype, _device(backend))
    for name, largest in (("q", 1), ("k", 50), ("v", 50)):
        inputs[name] = (inputs[name] * 15).clamp(-largest, largest)
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = retention(**leaves)
        (out.float() * 1e-4).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 5, 3, 4, 6, has_state=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 12)}, r"q has shape \(2, 5, 12\), expected \(B, L, heads, K\)"),
        ({"q": torch.zeros(2, 5, 3, 0)}, r"q has shape .* positive heads and K"),
        ({"k": torch.zeros(2, 5, 3, 5)}, r"k has shape \(2, 5, 3, 5\), expected that of q"),
        ({"v": torch.zeros(2, 4, 3, 6)}, r"v has shape \(2, 4, 3, 6\), expected .* = \(2, 5, 3, V\)"),
        ({"gammas": torch.zeros(2)}, r"gammas has shape \(2,\), expected \(heads,\) = \(3,\)"),
        ({"gammas": [0.5, 0.9, 1.5]}, r"gammas holds 1.5, expected decays above 0 and at most 1"),
        ({"initial_state": torch.zeros(2, 3, 6, 4)}, r"initial_state has shape .* = \(2, 3, 4, 6\)"),
        ({"mode": "chunk"}, "mode 'chunk' is not one of parallel, recurrent, chunkwise"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
        ({"v": torch.zeros(2, 5, 3, 6, dtype=torch.int64)}, "v is torch.int64, expected a floating-point"),
        ({"v": torch.zeros(2, 5, 3, 6).double()}, "v is torch.float64 and q torch.float32"),
        ({"gammas": torch.zeros(3, device="meta")}, "gammas is on meta, expected the device of q"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retention(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", ["tiny", "parallel"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    tensors = [inputs[k].requires_grad_() for k in ("q", "k", "v", "gammas", "initial_state")]
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.vitzoo.retention.default, (*tensors, 0.5, inputs["mode"], inputs["chunk_size"])
        )


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, backend: str) -> None:
    inputs = make_inputs(Shape(2, 5, 2, 2, 3, has_state=True), torch.float64)
    tensors = [inputs[k].requires_grad_() for k in ("q", "k", "v", "gammas", "initial_state")]

    def function(q: Tensor, k: Tensor, v: Tensor, gammas: Tensor, state: Tensor) -> Any:
        options = {"mode": mode, "chunk_size": 2, "return_final_state": True}
        return retention(q, k, v, gammas, initial_state=state, **options)

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, tensors)


class _Retention(nn.Module):
    def __init__(self, mode: str = "chunkwise") -> None:
        super().__init__()
        self.mode = mode
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("gammas", torch.tensor([0.9, 0.99]))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return retention(q, k, v, self.gammas, mode=self.mode, chunk_size=4).flatten(2)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    layer, x = _Retention(), image((2, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (layer, compiled):
        layer.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("mode", MODES)
def test_exports_to_onnx_without_a_loop(mode: str, tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer, path = _Retention(mode).eval(), tmp_path / "layer.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            layer,
            (image((2, 11, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    assert not {"Scan", "Loop"} & {n.op_type for n in program.model.graph}
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 11, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, layer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_recurrence() -> None:
    inputs = make_inputs(Shape(2, 5, 3, 4, 6))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    # k v^T and q S, each K x V multiply-adds a token and head, 2 FLOPs a multiply-add
    forward = 2 * 2 * (2 * 5 * 3) * (4 * 6)
    with FlopCounterMode(display=False) as counter:
        out = retention(**leaves)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward // 2 * 5
    assert kind(torch.ops.vitzoo.retention, by_weight=False) == "scan"


def test_autocast_keeps_the_state_wide() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = retention(**{**inputs, "k": inputs["k"].bfloat16()}, return_final_state=True)
    expected = retention(**inputs)
    assert state.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    for name in ("two_chunks", "many_heads"):
        inputs, results = make_inputs(SHAPES[name]), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(outputs_and_gradients(retention, inputs))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(results[0][k], other[k]) for k in other)
