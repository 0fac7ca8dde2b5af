"""The causal convolution: every backend against the goldens, the float64 reference and the rules of torch."""

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

from vitzoo.kernels.causal_conv1d import causal_conv1d, cuda
from vitzoo.kernels.causal_conv1d.inputs import BASELINES, MODEL_SHAPES, SHAPES, Shape, make_inputs
from vitzoo.kernels.causal_conv1d.reference import causal_conv1d_reference
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

GOLDEN = {c["id"]: c for c in load_golden("ops/causal_conv1d")["cases"]}
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CPU, TRITON = pytest.param("cpu", marks=needs_extension), pytest.param("triton", marks=needs_triton)
# the CUDA kernels run here in their host form; they take no float64
CUDA = pytest.param("cuda", marks=needs_extension)
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITZOO_CUDA_ON_CPU", "1")


def _with_states(**inputs: Any) -> Any:
    return causal_conv1d(**inputs, return_final_states=True)


def _device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON, CUDA])
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, backend: str) -> None:
    golden = GOLDEN[case]
    inputs = {k: golden_tensor(v).to(_device(backend)).requires_grad_() for k, v in golden["inputs"].items()}
    with use_backend(backend):
        out, states = _with_states(**inputs, **golden["options"])
        (out * image(out.shape, 7).to(out.device)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    assert_golden(states, golden["outputs"]["final_states"], 1e-5, "final_states")
    for name, recorded in golden["grads"].items():
        assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(_with_states, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if n != "long"])
def test_triton_is_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    assert_backend_close(_with_states, make_inputs(SHAPES[name], dtype, DEVICE), "triton", use_backend)


@needs_extension
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_on_the_host_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(_with_states, make_inputs(shape, dtype), "cuda", use_backend)


# segments, warps and passes over a segment, in every mixture
@needs_extension
@pytest.mark.parametrize(("segment", "threads"), [(1, 32), (7, 32), (64, 64), (200, 96)])
@pytest.mark.parametrize("name", ["shorter_than_width", "reverse", "channels_last_reverse"])
def test_cuda_on_the_host_cuts_the_work_in_any_way(
    segment: int, threads: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "plan", lambda *sizes: (segment, threads))
    assert_backend_close(_with_states, make_inputs(SHAPES[name]), "cuda", use_backend)


@needs_extension
@pytest.mark.parametrize("name", ["odd", "channels_last_reverse"])
def test_cuda_on_the_host_has_no_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, results = make_inputs(SHAPES[name]), []
    for order in ("forward", "reverse", "shuffled"):
        monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", order)
        with use_backend("cuda"):
            results.append(outputs_and_gradients(_with_states, inputs))
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


@needs_extension
def test_cuda_refuses_float64() -> None:
    with use_backend("cuda"), pytest.raises(BackendError, match=r"x is torch.float64, not float32"):
        causal_conv1d(**make_inputs(SHAPES["tiny"], torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *MODEL_SHAPES.values()], ids=[*SHAPES, *MODEL_SHAPES])
def test_cuda_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(_with_states, make_inputs(shape, dtype, "cuda"), "cuda", use_backend)


@needs_triton
def test_triton_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(BackendError, match=r"x is torch.float64, not float32"):
        causal_conv1d(**make_inputs(SHAPES["tiny"], torch.float64, DEVICE))


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON, CUDA])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_reverse_is_forward_between_flips(channels_last: bool, width: int, backend: str) -> None:
    shape = Shape(2, 19, 37, width, has_initial=True, channels_last=channels_last)
    inputs = make_inputs(shape, device=_device(backend))
    del inputs["reverse"]
    flipped = {**inputs, "x": inputs["x"].flip(-1)}
    with use_backend(backend):
        out, states = _with_states(**inputs, reverse=True)
        expected, expected_states = _with_states(**flipped)
    torch.testing.assert_close(out, expected.flip(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(states, expected_states)


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """Return x in other memory layouts: channels last, every second element, expanded."""
    wide = x.new_zeros((*x.shape, 2))
    wide[..., 0] = x
    return {
        "channels_last": x.transpose(1, 2).contiguous().transpose(1, 2),
        "channel_chunk": torch.cat([x, x], dim=1).transpose(1, 2).contiguous().transpose(1, 2).chunk(2, 1)[1],
        "every_second": wide[..., 0],
        "batch_last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@pytest.mark.parametrize("backend", ["reference", CPU, TRITON, CUDA])
@pytest.mark.parametrize("layout", ["channels_last", "channel_chunk", "every_second", "batch_last"])
def test_non_contiguous_inputs(layout: str, backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"], device=_device(backend))
    strided = {**inputs, "x": _layouts(inputs["x"])[layout]}
    strided["weight"] = strided["weight"].t().contiguous().t()
    assert not strided["x"].is_contiguous()
    with use_backend(backend):
        ours = outputs_and_gradients(_with_states, strided)
        expected = outputs_and_gradients(_with_states, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", CPU, CUDA])
def test_out_has_the_layout_of_x(backend: str) -> None:
    inputs = make_inputs(SHAPES["channels_last"])
    with use_backend(backend):
        assert causal_conv1d(**inputs).transpose(1, 2).is_contiguous()
        assert causal_conv1d(**{**inputs, "x": inputs["x"].contiguous()}).is_contiguous()


@pytest.mark.parametrize("backend", ["reference", CPU, CUDA])
@pytest.mark.parametrize("empty", ["batch", "dim", "seqlen"])
def test_empty_inputs(backend: str, empty: str) -> None:
    inputs = make_inputs(Shape(**{"batch": 2, "dim": 4, "seqlen": 5, empty: 0}, has_initial=True))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out, states = _with_states(**leaves)
        (out.sum() + states.sum()).backward()
    assert out.shape == inputs["x"].shape
    if empty == "seqlen":
        assert torch.equal(states, inputs["initial_states"])
    assert not inputs["weight"].grad.any()


# NumPy's, in Triton's interpreter: exp(-y) is infinite there and sigmoid zero
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("backend", ["reference", CPU, TRITON, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(2, 24, 61, 4, has_initial=True), dtype, _device(backend))
    inputs["x"] = inputs["x"].clamp(-3, 3) * 40  # to 120
    with use_backend(backend):
        results = outputs_and_gradients(_with_states, inputs)
    assert all(torch.isfinite(value).all() for value in results.values())


@needs_extension
def test_a_nan_stays_in_its_window() -> None:
    inputs = make_inputs(Shape(2, 20, 140, 4))
    inputs["x"][1, 7, 126] = float("nan")
    leaf = inputs["x"].requires_grad_()
    out = causal_conv1d(**inputs)
    out[..., :100].sum().backward()
    expected = torch.zeros(2, 20, 140, dtype=torch.bool)
    expected[1, 7, 126:130] = True
    assert torch.equal(out.isnan(), expected)
    assert not leaf.grad[1, 7, :100].isnan().any()


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 6, 5, 3)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(6, 5)}, r"x has shape \(6, 5\), expected \(B, D, L\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\), expected \(D, W\) = \(6, W\)"),
        ({"weight": torch.zeros(6, 1)}, r"weight has shape \(6, 1\), .* W 2, 3 or 4"),
        ({"weight": torch.zeros(6, 5)}, r"weight has shape \(6, 5\), .* W 2, 3 or 4"),
        ({"weight": torch.zeros(6, 1, 3)}, r"weight has shape \(6, 1, 3\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected \(D,\) = \(6,\)"),
        ({"initial_states": torch.zeros(2, 6, 3)}, r"initial_states has shape .* W - 1\) = \(2, 6, 2\)"),
        ({"activation": "gelu"}, r"activation is 'gelu', expected None, 'silu' or 'swish'"),
        ({"x": torch.zeros(2, 6, 5, dtype=torch.int64)}, "x is torch.int64, expected a floating-point dtype"),
        ({"weight": torch.zeros(6, 3, device="meta")}, "weight is on meta, expected the device of x"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**_small(**changes))


def _arguments(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments of the operator itself, every tensor with a gradient."""
    inputs = make_inputs(shape, dtype)
    x, *others = (
        None if inputs[k] is None else inputs[k].requires_grad_()
        for k in ("x", "weight", "bias", "initial_states")
    )
    x = x.detach().transpose(1, 2).requires_grad_() if shape.channels_last else x
    return (x, *others, shape.activation is not None, shape.reverse, shape.channels_last)


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize("name", ["tiny", "plain", "shorter_than_width", "channels_last_reverse"])
def test_opcheck(name: str, backend: str) -> None:
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.causal_conv1d.default, _arguments(SHAPES[name], torch.float64))


@pytest.mark.parametrize("backend", ["reference", CPU])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 2, 5, 4, has_initial=True),
        Shape(2, 3, 2, 4, has_initial=True, reverse=True),
        Shape(1, 3, 4, 2, has_initial=True, reverse=True, channels_last=True),
        Shape(1, 2, 4, 3, has_bias=False, activation=None),
    ],
    ids=["silu", "short_reverse", "channels_last_reverse", "plain"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
    options = {k: v for k, v in inputs.items() if k not in names}

    def conv(*tensors: Tensor) -> Any:
        return _with_states(**dict(zip(names, tensors, strict=True)), **options)

    with use_backend(backend):
        assert torch.autograd.gradcheck(conv, [inputs[k].requires_grad_() for k in names])


def test_second_derivatives_are_refused() -> None:
    inputs = _small()
    x = inputs.pop("x").requires_grad_()
    (grad,) = torch.autograd.grad(causal_conv1d(x, **inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d can be differentiated once only"):
        grad.sum().backward()


class _Mixer(nn.Module):
    """Both directions behind a linear layer, as Vim uses them; its output is channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 12)
        self.ahead, self.back = (nn.Conv1d(12, 12, 4, groups=12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        x = self.project(x).transpose(1, 2)
        ahead, states = causal_conv1d(
            x, self.ahead.weight.squeeze(1), self.ahead.bias, None, "silu", return_final_states=True
        )
        back = causal_conv1d(
            x, self.back.weight.squeeze(1), self.back.bias, states, activation="silu", reverse=True
        )
        return ahead + back


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


def test_exports_to_onnx_convolutions(tmp_path) -> None:
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
    assert [n.op_type for n in program.model.graph].count("Conv") == 2
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 9, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, mixer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_convolution() -> None:
    inputs = make_inputs(Shape(2, 6, 5, 3, channels_last=True))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        out = causal_conv1d(**leaves)
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 3
    with FlopCounterMode(display=False) as counter:
        causal_conv1d_reference(**inputs)
    assert counter.get_total_flops() == 2 * 2 * 6 * 5 * 3
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * 5 * 3


@pytest.mark.parametrize("name", BASELINES)
def test_the_formulations_it_is_timed_against_agree(name: str) -> None:
    inputs = make_inputs(Shape(2, 6, 9, 4))
    torch.testing.assert_close(BASELINES[name](**inputs), causal_conv1d(**inputs))


def test_autocast_leaves_x_alone() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d(**inputs)
        short = causal_conv1d(**{**inputs, "x": inputs["x"].bfloat16()})
    torch.testing.assert_close(out, causal_conv1d(**inputs), rtol=0, atol=0)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), out, rtol=2e-2, atol=2e-2)


@needs_extension
@pytest.mark.parametrize("name", ["odd", "channels_last_reverse", "long"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    inputs, threads, results = make_inputs(SHAPES[name]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(_with_states, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


_FORCED = """
import torch
from vitzoo.kernels.causal_conv1d import causal_conv1d, cuda
from vitzoo.kernels.causal_conv1d.inputs import SHAPES, make_inputs
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.testing import FLOORS, assert_backend_close
for shape in SHAPES.values():
    for dtype in FLOORS:
        assert_backend_close(causal_conv1d, make_inputs(shape, dtype), "cpu", use_backend)
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
