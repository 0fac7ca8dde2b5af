"""The selective scan: every backend against the goldens, the float64 reference and the rules of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, operators, use_backend
from vitzoo.kernels.common.scan_support import is_divided
from vitzoo.kernels.selective_scan import cuda, selective_scan
from vitzoo.kernels.selective_scan.flops import selective_scan_flops
from vitzoo.kernels.selective_scan.inputs import MODEL_SHAPES, SHAPES, Shape, floor_call, make_inputs
from vitzoo.kernels.selective_scan.reference import selective_scan_reference
from vitzoo.testing import FLOORS, assert_backend_close, assert_golden, golden_tensor, image, load_golden

GOLDEN = {c["id"]: c for c in load_golden("ops/selective_scan")["cases"]}
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the CUDA kernels run here in their host form; they take no float64
FLOAT32_BACKENDS = [*BACKENDS, pytest.param("cuda", marks=needs_extension)]


@pytest.fixture(autouse=True)
def _cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITZOO_CUDA_ON_CPU", "1")


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("case", GOLDEN)
def test_goldens(case: str, backend: str) -> None:
    golden = GOLDEN[case]
    inputs = {k: golden_tensor(v).requires_grad_() for k, v in golden["inputs"].items()}
    if golden["A"] == "complex" and backend != "reference":
        with use_backend(backend), pytest.raises(BackendError, match="takes no complex A"):
            selective_scan(**inputs, **golden["options"])
        return
    with use_backend(backend):
        out, last = selective_scan(**inputs, **golden["options"], return_last_state=True)
        (out * image(out.shape, 7)).sum().backward()
    assert_golden(out, golden["outputs"]["out"], 1e-5, "out")
    assert_golden(_real(last), golden["outputs"]["last_state"], 1e-5, "last_state")
    for name, recorded in golden["grads"].items():
        values = np.asarray(recorded["values"], dtype=np.float64)
        if np.linalg.norm(values) == 0:  # A of a single token
            assert float(_real(inputs[name].grad).abs().max()) < 1e-6, name
        else:
            assert_golden(_real(inputs[name].grad), recorded, 1e-5, f"gradient of {name}")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype) | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "cpu", use_backend)


@needs_extension
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_on_the_host_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype) | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "cuda", use_backend)


# chunks, warps and channels a block takes one after the other, in every mixture
@needs_extension
@pytest.mark.parametrize(("tokens", "threads"), [(4, 32), (8, 32), (4, 64), (8, 96)])
@pytest.mark.parametrize("part", [1, 3])
@pytest.mark.parametrize("groups", [0, 2, -1])
def test_cuda_on_the_host_cuts_the_work_in_any_way(
    tokens: int, threads: int, part: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "plan", lambda seqlen: (tokens, threads))
    monkeypatch.setattr(cuda, "part_channels", lambda *sizes: part)
    inputs = make_inputs(Shape(2, 8, 301, 2, groups=groups)) | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "cuda", use_backend)


@needs_extension
@pytest.mark.parametrize(("tokens", "threads"), [(4, 32), (4, 64)])
def test_cuda_on_the_host_has_no_race(tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "plan", lambda seqlen: (tokens, threads))
    inputs, results = make_inputs(Shape(1, 4, 301, 3, groups=2)), []
    for order in ("forward", "reverse", "shuffled"):
        monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", order)
        with use_backend("cuda"):
            results.append(_output_and_gradients(inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_cuda_takes_mixed_dtypes_as_they_are() -> None:
    inputs = make_inputs(SHAPES["odd"], torch.bfloat16)
    inputs["delta"], inputs["B"] = inputs["delta"].float(), inputs["B"].half()
    assert_backend_close(selective_scan, inputs, "cuda", use_backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *MODEL_SHAPES.values()], ids=[*SHAPES, *MODEL_SHAPES])
def test_cuda_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, "cuda") | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "cuda", use_backend)


@pytest.mark.gpu
def test_cuda_repeats_bit_for_bit_and_on_another_stream() -> None:
    inputs, results = make_inputs(MODEL_SHAPES["vim_tiny_b1"], torch.bfloat16, "cuda"), []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with use_backend("cuda"), torch.cuda.stream(stream):
            results.append(_output_and_gradients(inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["odd"])
    strided = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in inputs.items()
    }
    assert not strided["u"].is_contiguous()
    with use_backend(backend):
        torch.testing.assert_close(selective_scan(**strided), selective_scan(**inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "seqlen"])
def test_empty_inputs(backend: str, empty: str) -> None:
    shape = Shape(**{"batch": 2, "dim": 4, "seqlen": 5, "dstate": 3, empty: 0})
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in make_inputs(shape).items()}
    with use_backend(backend):
        out, last = selective_scan(**inputs, return_last_state=True)
        (out.sum() + last.sum()).backward()
    assert out.shape == inputs["u"].shape
    assert not last.any()
    assert not inputs["A"].grad.any()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    # the ranges of a trained Mamba, state-spaces/mamba#72
    inputs = make_inputs(Shape(2, 24, 61, 16), dtype)
    inputs["u"], inputs["z"] = inputs["u"] * 15, inputs["z"] * 40
    inputs["delta"] = inputs["delta"] * 10
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = selective_scan(**leaves)
        out.float().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 6, 5, 3)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(6, 5)}, r"u has shape \(6, 5\), expected \(B, D, L\)"),
        ({"delta": torch.zeros(2, 6, 4)}, r"delta has shape \(2, 6, 4\), expected that of u"),
        ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\), expected \(D, N\) = \(6, N\)"),
        ({"B": torch.zeros(2, 4, 5)}, r"B has shape \(2, 4, 5\), expected \(B, N, L\) = \(2, 3, 5\)"),
        ({"C": torch.zeros(2, 4, 3, 5)}, r"C has shape .* G a divisor of 6"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\), expected \(D,\) = \(6,\)"),
        ({"z": torch.zeros(2, 6, 6)}, r"z has shape \(2, 6, 6\)"),
        ({"u": torch.zeros(2, 6, 5, dtype=torch.int64)}, "u is torch.int64, expected a floating-point dtype"),
        ({"A": torch.zeros(6, 3, device="meta")}, "A is on meta, expected the device of u"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**_small(**changes))


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "groups", "constant", "plain"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.selective_scan.default, tuple(inputs.get(n) for n in names))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 2, 4, 2), Shape(2, 4, 3, 2, groups=2), Shape(1, 3, 3, 2, groups=-1)],
    ids=["", "groups", "const"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64)
    softplus = inputs.pop("delta_softplus")
    names = [k for k, v in inputs.items() if v is not None]

    def scan(*tensors: Tensor) -> Any:
        return selective_scan(
            **dict(zip(names, tensors, strict=True)), delta_softplus=softplus, return_last_state=True
        )

    with use_backend(backend):
        assert torch.autograd.gradcheck(scan, [inputs[k].double().requires_grad_() for k in names])


def test_gradcheck_of_the_reference() -> None:
    inputs = make_inputs(Shape(1, 2, 4, 2), torch.float64)
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]

    def scan(*tensors: Tensor) -> Any:
        return selective_scan_reference(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, [inputs[k].double().requires_grad_() for k in names])


def test_second_derivatives_are_refused() -> None:
    inputs = _small()
    u = inputs.pop("u").requires_grad_()
    (grad,) = torch.autograd.grad(selective_scan(u, **inputs).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


class _Mixer(nn.Module):
    """Both directions as two groups of one scan, as Vim uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(8, 4) - 0.1)
        self.D = nn.Parameter(torch.ones(8))
        self.project = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, 8)
        u = x.transpose(1, 2)
        b, c = self.project(x).transpose(1, 2).unflatten(1, (2, 2, 4)).unbind(1)
        return selective_scan(u, u.abs(), self.A, b, c, self.D, u, delta_softplus=True)


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
    # 7 a state and token (exp and product for the decay, product for the drive, product and sum for the
    # recurrence, product and sum for the output), counted by hand for each option
    shape = Shape(2, 6, 5, 3, has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False)
    states, tokens = 2 * 6 * 5 * 3, 2 * 6 * 5
    bare = selective_scan_flops(2, 6, 5, 3)
    assert 7 * states <= bare <= 7 * states + 2 * tokens
    assert selective_scan_flops(2, 6, 5, 3, has_D=True, convention="paper") == 9 * states + tokens
    with FlopCounterMode(display=False) as counter:
        selective_scan(**make_inputs(shape))
    assert counter.get_total_flops() == bare


def test_autocast_keeps_the_state_wide() -> None:
    inputs = _small()
    with torch.autocast("cpu", torch.bfloat16):
        out, last = selective_scan(**inputs, return_last_state=True)
    expected = selective_scan(**inputs)
    assert last.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_forced_backend_that_cannot_run_is_an_error() -> None:
    with (
        use_backend("cuda"),
        pytest.raises(
            BackendError, match=r"'cuda' was asked for but .*: u is float64, and its sums are float32"
        ),
    ):
        selective_scan(**make_inputs(SHAPES["tiny"], torch.float64))
    with use_backend("cuda"), pytest.raises(BackendError, match="A has 257 states, more than 256"):
        selective_scan(**make_inputs(Shape(1, 1, 2, 257)))
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


def test_every_backend_gives_its_reason() -> None:
    for backend in operators["selective_scan"].backends:
        reason = backend.why_not()
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


_FORCED = """
import torch, warnings
from vitzoo.kernels.common import native
from vitzoo.kernels.selective_scan import selective_scan
from vitzoo.kernels.selective_scan.inputs import SHAPES, make_inputs
inputs = make_inputs(SHAPES["odd"])
leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
out = selective_scan(**leaves)
out.square().sum().backward()
print(native.cpu_isa(), float(out.double().sum()), float(leaves["A"].grad.double().sum()))
"""


def _in_a_process(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _FORCED], capture_output=True, text=True, env={**os.environ, **env}
    )


@needs_extension
def test_every_instruction_set_of_this_cpu_agrees() -> None:
    best = native.cpu_isa()
    results = {}
    for isa in ("baseline", "avx2", "avx512")[: ("baseline", "avx2", "avx512").index(best) + 1]:
        done = _in_a_process(VITZOO_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        name, out, grad = done.stdout.split()
        assert name == isa
        results[isa] = (float(out), float(grad))
    for values in results.values():
        np.testing.assert_allclose(values, results[best], rtol=1e-4)


@needs_extension
def test_an_unknown_instruction_set_is_an_error() -> None:
    done = _in_a_process(VITZOO_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "avx1024" in done.stderr


def _output_and_gradients(inputs: dict[str, Any]) -> list[Tensor]:
    leaves = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    out, last = selective_scan(**leaves, return_last_state=True)
    (out.square().sum() + last.sum()).backward()
    return [out, last, *(v.grad for v in leaves.values() if isinstance(v, Tensor))]


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(Shape(2, 70, 40, 5)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_output_and_gradients(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_the_floor_is_as_many_exponentials_as_the_scan() -> None:
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[native.cpu_isa() or ""]
    assert torch.ops.vitzoo_native.scan_exponentials(0) == 1024 * lanes
    seconds = []
    for shape in (
        Shape(1, 4, 16, 16),
        Shape(1, 256, 1024, 16),
    ):  # 1 or a part of one work item, and 256 to 1024
        work = floor_call(shape)
        assert work is not None
        rounds = []
        for _ in range(10):
            start = time.perf_counter()
            work()
            rounds.append(time.perf_counter() - start)
        seconds.append(min(rounds))
    assert seconds[1] > 10 * seconds[0]


# Divided along the tokens: L just long enough, pieces of 512 tokens with a short last one, both tiles of a vector
# and lanes without a channel, N that leaves a state over, groups, and none of the options.
DIVIDED = {
    "short": Shape(1, 4, 1024, 1),
    "long": Shape(1, 8, 16384 + 300, 5),
    "tiles": Shape(1, 16, 2200, 16),
    "batch": Shape(2, 13, 1500, 3, groups=1),
    "groups": Shape(1, 12, 1281, 4, groups=4),
    "plain": Shape(1, 7, 1279, 2, has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False),
}


@needs_extension
@pytest.mark.parametrize("shape", DIVIDED.values(), ids=DIVIDED)
def test_pieces_of_the_tokens_join(shape: Shape) -> None:
    assert is_divided(shape.batch * max(shape.groups, 1), shape.seqlen)
    # slow decays, so that what enters a piece is felt in the last of them
    inputs = make_inputs(shape) | {"return_last_state": True}
    inputs["A"] = 0.01 * inputs["A"]
    assert_backend_close(selective_scan, inputs, "cpu", use_backend)


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", DIVIDED.values(), ids=DIVIDED)
def test_the_number_of_threads_changes_no_bit_of_a_divided_scan(
    shape: Shape, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("baseline", "avx2", "avx512")
    if sets.index(isa) > sets.index(native.cpu_isa() or "baseline"):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("VITZOO_CPU_ISA", isa)
    inputs, threads, results = make_inputs(shape, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            with use_backend("cpu"):
                results.append(_output_and_gradients(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_a_growing_state_of_zero_stays_zero_over_pieces() -> None:
    inputs = make_inputs(Shape(1, 4, 2048, 2, has_z=False))
    inputs["A"], inputs["u"] = -inputs["A"], torch.zeros(1, 4, 2048)
    with use_backend("cpu"):
        assert not selective_scan(**inputs).any()


@needs_extension
@pytest.mark.parametrize("name", ["u", "delta"])
def test_a_nan_stays_in_its_channel_and_does_not_vanish(name: str) -> None:
    inputs = make_inputs(Shape(2, 20, 40, 3))
    inputs[name][1, 7, 25] = float("nan")
    out = selective_scan(**inputs)
    expected = torch.zeros(2, 20, 40, dtype=torch.bool)
    expected[1, 7, 25:] = True
    assert torch.equal(out.isnan(), expected)


@needs_extension
def test_growing_states_overflow_where_the_reference_does() -> None:
    inputs = make_inputs(Shape(2, 20, 30, 3, has_z=False))
    inputs["A"], inputs["delta"] = -60 * inputs["A"], 10 * inputs["delta"]
    out, reference = selective_scan(**inputs), selective_scan_reference(**inputs)[0]
    assert not reference.isfinite().all()
    assert torch.equal(out.isfinite(), reference.isfinite())


@needs_extension
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 80.0, 300.0])
def test_decays_are_right_from_slow_to_vanishing(scale: float) -> None:
    # one state, an impulse, and one step: the output is exp(-delta)
    delta = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0)) * scale
    delta[..., 0] = 1
    impulse = torch.tensor([1.0, 0.0]).expand(1, 64, 2)
    ones = torch.ones(1, 1, 2)
    out = selective_scan(impulse, delta, -torch.ones(64, 1), ones, ones)[0, :, 1].double()
    exact = torch.exp(-delta[0, :, 1].double())
    # log2(e) is rounded once into A, so the relative error grows with the exponent
    assert ((out - exact).abs() <= (2e-7 + 6e-8 * scale) * exact + 2.4e-38).all()


@pytest.mark.slow
def test_inductor_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    mixer, x = _Mixer(), image((2, 9, 8))
    torch.compiler.reset()
    grads = []
    for module in (mixer, torch.compile(mixer, fullgraph=True)):
        mixer.zero_grad()
        module(x).square().sum().backward()
        grads.append([p.grad.clone() for p in mixer.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
