"""Token reorganization: every backend against the definition, the float64 reference and the rules of torch."""

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
from vitzoo.kernels.reorganize_tokens import reorganize_tokens
from vitzoo.kernels.reorganize_tokens.inputs import SHAPES, Shape, make_inputs
from vitzoo.testing import FLOORS, assert_backend_close, image, outputs_and_gradients

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CPU, TRITON = pytest.param("cpu", marks=needs_extension), pytest.param("triton", marks=needs_triton)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(reorganize_tokens, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_triton_is_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    assert_backend_close(reorganize_tokens, make_inputs(SHAPES[name], dtype, DEVICE), "triton", use_backend)


@needs_triton
def test_triton_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"x is torch.float64, not float32"):
        reorganize_tokens(**make_inputs(SHAPES["odd"], torch.float64, DEVICE))


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_a_sort_a_gather_and_a_sum(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], device=_device(backend))
    with use_backend(backend):
        tokens, indices = reorganize_tokens(**inputs)
    keep, rows = inputs["keep"], []
    for x, scores in zip(inputs["x"].cpu().double(), inputs["scores"].cpu().double(), strict=True):
        order = sorted(range(len(scores)), key=lambda t, s=scores: -float(s[t]))
        chosen = [x[0], *(x[1 + t] for t in order[:keep])]
        if inputs["fuse"] and keep < len(scores):
            chosen.append(sum(scores[t] * x[1 + t] for t in order[keep:]))
        rows.append((torch.stack(chosen), torch.tensor(order[:keep])))
    assert torch.equal(indices.cpu(), torch.stack([r[1] for r in rows]))
    torch.testing.assert_close(tokens.cpu(), torch.stack([r[0] for r in rows]).float())


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_equal_scores_keep_their_order_and_nan_comes_first(backend: str) -> None:
    scores = torch.tensor([[0.5, 0.7, 0.5, float("nan"), 0.5, 0.7, -0.0, 0.0, float("nan")]])
    x = image((1, 10, 4)).to(_device(backend))
    with use_backend(backend):
        _, indices = reorganize_tokens(x, scores.to(x.device), 9)
    assert indices.tolist() == [[3, 8, 1, 5, 0, 2, 4, 6, 7]]


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"], device=_device(backend))
    strided = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        ours, expected = (outputs_and_gradients(reorganize_tokens, i) for i in (strided, inputs))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("empty", ["batch", "channels"])
def test_empty_inputs(backend: str, empty: str) -> None:
    inputs = make_inputs(Shape(**{"batch": 2, "length": 6, "channels": 3, "keep": 2, empty: 0}))
    x, scores = inputs["x"].requires_grad_(), inputs["scores"].requires_grad_()
    with use_backend(backend):
        tokens, indices = reorganize_tokens(x, scores, 2, True)
        tokens.sum().backward()
    assert tokens.shape == (x.shape[0], 4, x.shape[2])
    assert indices.shape == (x.shape[0], 2)
    assert not scores.grad.any()


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON])
def test_large_inputs_stay_finite(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"], torch.float16, _device(backend))
    inputs["x"] = inputs["x"].clamp(-3, 3) * 15000  # their plain sum overflows
    with use_backend(backend):
        results = outputs_and_gradients(reorganize_tokens, inputs)
    assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x has shape \(2, 3\), expected \(B, L, C\)"),
        ({"scores": torch.zeros(3, 8)}, r"scores have shape \(3, 8\), expected \(B, L - 1\) with B 1"),
        ({"scores": torch.zeros(1, 9)}, "scores have 9 entries, 8 tokens besides the class token need 8"),
        ({"keep": 0}, r"keep 0 is not in 1 \.\. 8, the number of tokens besides the class token"),
        ({"keep": 9}, r"keep 9 is not in 1 \.\. 8"),
        ({"x": torch.zeros(1, 9, 2, dtype=torch.int8)}, "x is torch.int8, expected a floating-point dtype"),
        ({"scores": torch.zeros(1, 8, device="meta")}, "scores are on meta, expected the device of x"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reorganize_tokens(**{**make_inputs(Shape(1, 9, 2, 3)), **changes})


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("name", ["odd", "unfused", "keeps_all"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    args = tuple(v.requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values())
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.reorganize_tokens.default, args)


@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("fuse", [False, True])
def test_gradcheck(fuse: bool, backend: str) -> None:
    inputs = make_inputs(Shape(2, 7, 3, 3), torch.float64)

    def tokens(x: Tensor, scores: Tensor) -> Tensor:
        return reorganize_tokens(x, scores, 3, fuse)[0]

    with use_backend(backend):
        assert torch.autograd.gradcheck(
            tokens, (inputs["x"].requires_grad_(), inputs["scores"].requires_grad_())
        )


@needs_extension
@pytest.mark.filterwarnings("ignore:vitzoo runs reorganize_tokens in plain torch ops:UserWarning")
def test_scores_wider_than_the_tokens_keep_their_order() -> None:
    scores = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 + 2e-12]], dtype=torch.float64)
    x = image((1, 4, 2))
    assert reorganize_tokens(x, scores, 2)[1].tolist() == [[2, 1]]
    with use_backend("cpu"), pytest.raises(BackendError, match="their order would be lost in float32"):
        reorganize_tokens(x, scores, 2)


class _Pruned(nn.Module):
    """Scores by a linear layer, as differentiable as attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        scores = self.score(x[:, 1:]).squeeze(-1).softmax(dim=-1)
        tokens, indices = reorganize_tokens(x, scores, 4, True)
        return tokens + indices.float().mean()


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    pruned, x = _Pruned(), image((2, 9, 8))
    torch.compiler.reset()
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    grads = []
    for module in (pruned, compiled):
        pruned.zero_grad()
        out = module(x)
        out.square().sum().backward()
        grads.append([out, *(p.grad.clone() for p in pruned.parameters())])
    torch.testing.assert_close(grads[1], grads[0])


def test_exports_to_onnx(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    pruned, path = _Pruned().eval(), tmp_path / "pruned.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            pruned,
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
            np.testing.assert_allclose(out, pruned(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_flops_are_those_of_the_fusion(fuse: bool) -> None:
    inputs = {**make_inputs(Shape(2, 9, 5, 3)), "fuse": fuse}
    with FlopCounterMode(display=False) as counter:
        reorganize_tokens(**inputs)
    assert counter.get_total_flops() == (2 * 2 * 5 * 5 if fuse else 0)


def test_autocast_widens_the_scores_alone() -> None:
    inputs = make_inputs(Shape(2, 9, 5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, indices = reorganize_tokens(**inputs)
    expected, expected_indices = reorganize_tokens(**inputs)
    assert torch.equal(tokens, expected)
    assert torch.equal(indices, expected_indices)


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(SHAPES["odd"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(reorganize_tokens, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


_FORCED = """
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.reorganize_tokens import reorganize_tokens
from vitzoo.kernels.reorganize_tokens.inputs import SHAPES, make_inputs
from vitzoo.testing import FLOORS, assert_backend_close
for shape in SHAPES.values():
    for dtype in FLOORS:
        assert_backend_close(reorganize_tokens, make_inputs(shape, dtype), "cpu", use_backend)
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
