"""int8_linear: every backend and instruction set gives the integers of the definition, and the same bits."""

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
from vitzoo.kernels.int8_linear import int8_linear
from vitzoo.kernels.int8_linear.inputs import SHAPES, Shape, make_inputs
from vitzoo.testing import image

needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
with use_backend("triton"):  # the interpreter runs only when asked for
    NO_TRITON = triton_support.why_not()
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=f"no Triton: {NO_TRITON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _by_hand(inputs: dict[str, Any]) -> np.ndarray:
    """Return the output before the activation, from integer sums in NumPy and float32 arithmetic, step by step."""
    x = inputs["x"].float().numpy() if inputs["x"].is_floating_point() else inputs["x"].numpy()
    weight = inputs["weight_int8"].numpy().astype(np.int64)
    zero = 0 if inputs["x_zero_point"] is None else int(inputs["x_zero_point"])
    unsigned = inputs["x_zero_point"] is not None and inputs["x_zero_point"].dtype == torch.uint8
    if inputs["x_scale"] is None:
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    else:
        scale = inputs["x_scale"].numpy()
        scale = scale[..., None] if scale.ndim else scale
    codes = x.astype(np.int64)
    if inputs["x"].is_floating_point():
        low, high = (0, 255) if unsigned else (-128, 127)
        codes = np.clip(np.rint(x / scale).astype(np.int64) + zero, low, high)
    sums = np.einsum("...k,ok->...o", codes - zero, weight)
    y = sums.astype(np.float32) * (scale * inputs["weight_scale"].numpy())
    return y if inputs["bias"] is None else y + inputs["bias"].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.activation is None and s.out is None])
def test_integers_are_those_of_a_computation_in_64_bits(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name])
    with use_backend(backend):
        out = int8_linear(**inputs)
    np.testing.assert_array_equal(out.numpy(), _by_hand(inputs))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_gives_the_bits_of_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    with use_backend("reference"):
        expected = int8_linear(**inputs)
    with use_backend("cpu"):
        out = int8_linear(**inputs)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_gives_the_bits_of_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, DEVICE)
    with use_backend("reference"):
        expected = int8_linear(**inputs)
    with use_backend("triton"):
        out = int8_linear(**inputs)
    assert out.dtype == expected.dtype
    if out.dtype == torch.bfloat16 and triton_support.interpreting():
        # the interpreter cuts float32 off to bfloat16 where a GPU rounds it
        below = expected.view(torch.int16).int() - out.view(torch.int16).int()
        assert ((below == 0) | (below == 1)).all()
    else:
        assert torch.equal(out, expected)


@needs_triton
@pytest.mark.parametrize("out_scale", [None, 0.03], ids=["float", "codes"])
def test_triton_gelu(out_scale: float | None) -> None:
    inputs = make_inputs(Shape(21, 40, 33, activation="gelu"), device=DEVICE) | {"out_scale": out_scale}
    with use_backend("reference"):
        expected = int8_linear(**inputs)
    with use_backend("triton"):
        out = int8_linear(**inputs)
    if out_scale is None:
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    else:
        assert (out.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unsigned", [False, True], ids=["int8", "uint8"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 63, 64, 65, 1024])
def test_extreme_codes_do_not_saturate(depth: int, unsigned: bool, backend: str) -> None:
    # what vpmaddubsw gets wrong: adjacent products of one sign at both ends of the range
    kind = torch.uint8 if unsigned else torch.int8
    extremes = torch.tensor([torch.iinfo(kind).min, torch.iinfo(kind).max], dtype=kind)
    x = extremes[:, None].expand(2, depth)
    weight = torch.tensor([-128, 127, -127, 64], dtype=torch.int8)[:, None].repeat(1, depth)
    with use_backend(backend):
        out = int8_linear(x, weight, torch.ones(4), x_scale=1.0)
    assert torch.equal(out, (x.double() @ weight.double().t()).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_requantizing_equals_quantizing_the_output(backend: str) -> None:
    inputs = make_inputs(Shape(40, 64, 90, scale="tensor", zero_point="int8"))
    with use_backend(backend):
        y = int8_linear(**inputs)
        codes = int8_linear(**inputs | {"out_scale": 0.031, "out_zero_point": -5})
    expected = ((y / 0.031).round() - 5).clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes, expected)
    assert codes.unique().numel() > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_even_and_codes_are_clamped(backend: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, 126.5, float("nan"), float("inf")]])
    with use_backend(backend):
        codes = int8_linear(x, torch.eye(10, dtype=torch.int8), torch.ones(10), x_scale=1.0, out_scale=1.0)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 127, -128, 126, 0, 127]]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_as_close_as_the_reference(dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(64, 48, 100, scale="tensor", activation="gelu"), dtype)
    # scores from deep in the negative tail to far above
    inputs["weight_scale"] = inputs["weight_scale"] * 4
    before = int8_linear(**inputs | {"activation": None, "x": inputs["x"].float()})
    assert before.min() < -9
    exact = nn.functional.gelu(before.double())
    with use_backend("reference"):
        reference = int8_linear(**inputs).double()
    with use_backend("cpu"):
        out = int8_linear(**inputs).double()
    tolerance = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert float((out - exact).norm() / exact.norm()) <= max(tolerance, 2 * float((reference - exact).norm()))
    # element by element; the definition's own sum 1 + erf cancels in the tail, where half a unit of 1 remains
    assert ((out - exact).abs() <= 3 * tolerance * exact.abs() + 1e-7 * before.abs() + 6e-8).all()


@needs_extension
def test_gelu_codes_differ_by_one_at_most() -> None:
    inputs = make_inputs(Shape(200, 48, 130, "uint8", "tensor", "uint8", activation="gelu", out="uint8"))
    with use_backend("reference"):
        expected = int8_linear(**inputs).int()
    with use_backend("cpu"):
        out = int8_linear(**inputs).int()
    assert (out - expected).abs().max() <= 1
    assert (out != expected).double().mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_scale_of_zero_huge_and_nan_rows(backend: str) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2, 7], x[3] = 0, x[1] * 1e36, float("nan"), x[3] * 1e-36
    weight = make_inputs(Shape(1, 33, 20))["weight_int8"]
    with use_backend(backend):
        out = int8_linear(x, weight, torch.full((20,), 1e-3))
    assert not out[0].any()
    assert out[2].isnan().all()
    exact = x.double() @ weight.double().t() * 1e-3
    for row in (1, 4):
        assert float((out[row] - exact[row]).norm() / exact[row].norm()) < 0.02
    assert out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_approximates_the_float_layer(backend: str) -> None:
    layer, x = nn.Linear(96, 80), image((3, 50, 96))
    scale = layer.weight.detach().abs().amax(1) / 127
    codes = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
    with torch.no_grad(), use_backend(backend):
        exact = layer(x)
        dynamic = int8_linear(x, codes, scale, layer.bias)
        static = int8_linear(x, codes, scale, layer.bias, x_scale=float(x.abs().max()) / 127)
    assert float((dynamic - exact).norm() / exact.norm()) < 0.01
    assert float((static - exact).norm() / exact.norm()) < 0.02


@needs_extension
@pytest.mark.parametrize("scale", ["static", "row", "chosen"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 5), (37, 16), (16, 67), (50, 130)])
def test_rows_that_lie_side_by_side_give_the_same_bits(rows: int, depth: int, scale: str) -> None:
    x = image((3, depth, rows), 1).transpose(1, 2)
    x[1, 0, 2] = float("nan")
    weight, weight_scale = make_inputs(Shape(1, depth, 20))["weight_int8"], torch.rand(20) + 0.1
    x_scale = {"static": 0.02, "row": torch.rand(3, rows) * 0.02 + 0.01, "chosen": None}[scale]
    with use_backend("cpu"):
        expected = int8_linear(x.contiguous(), weight, weight_scale, x_scale=x_scale)
        padded = nn.functional.pad(x.transpose(1, 2), (0, 3))[..., :-3].transpose(1, 2)
        for turned in (x, padded):
            out = int8_linear(turned, weight, weight_scale, x_scale=x_scale)
            assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["three_axes"])
    strided = dict(inputs)
    strided["x"] = inputs["x"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["weight_int8"] = inputs["weight_int8"].t().contiguous().t()
    strided["weight_scale"] = inputs["weight_scale"].repeat_interleave(2)[::2]
    assert not strided["x"].is_contiguous()
    padded = nn.functional.pad(inputs["x"], (0, 9))[..., :-9]  # rows contiguous, further apart
    with use_backend(backend):
        expected = int8_linear(**inputs)
        assert torch.equal(int8_linear(**strided), expected)
        assert torch.equal(int8_linear(**inputs | {"x": padded}), expected)
        codes = make_inputs(SHAPES["codes_uint8_as_they_are"])
        apart = nn.functional.pad(codes["x"], (0, 3))[:, :-3]
        assert torch.equal(int8_linear(**codes | {"x": apart}), int8_linear(**codes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)], ids=str)
def test_empty_inputs(shape: tuple[int, ...], backend: str) -> None:
    inputs = make_inputs(Shape(1, 8, 6, scale="tensor")) | {"x": torch.zeros(shape)}
    inputs["weight_int8"] = inputs["weight_int8"][:, : shape[-1]]
    with use_backend(backend):
        out = int8_linear(**inputs)
    assert out.shape == (*shape[:-1], 6)
    assert torch.equal(out, inputs["bias"].expand_as(out))  # no inputs: the bias alone


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(3, 8, 5, scale="tensor")), **changes}


CODES = torch.zeros(3, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(3, 8).double()},
            "x is torch.float64, expected float32, bfloat16, float16, int8 or uint8",
        ),
        ({"x": torch.zeros(3, 7)}, r"x has shape \(3, 7\), expected \(\.\.\., I\) = \(\.\.\., 8\)"),
        ({"weight_int8": torch.zeros(5, 8)}, "weight_int8 is torch.float32, expected int8"),
        (
            {"weight_int8": torch.zeros(5, dtype=torch.int8)},
            r"weight_int8 has shape \(5,\), expected \(O, I\)",
        ),
        ({"weight_scale": torch.ones(4)}, r"weight_scale has shape \(4,\), expected \(O,\) = \(5,\)"),
        ({"weight_scale": torch.ones(5).double()}, "weight_scale is torch.float64, expected float32"),
        ({"bias": torch.ones(8)}, r"bias has shape \(8,\), expected \(O,\) = \(5,\)"),
        ({"x_scale": 0.0}, "x_scale is 0.0, expected a positive number"),
        ({"x_scale": torch.ones(4)}, r"x_scale has shape \(4,\), expected one element or one a row, \(3,\)"),
        ({"x_scale": torch.tensor(1)}, "x_scale is torch.int64, expected a floating-point dtype"),
        (
            {"x_zero_point": 200},
            "x_zero_point is 200, expected -128 to 127; for uint8 codes pass a uint8 tensor",
        ),
        (
            {"x_zero_point": torch.tensor(1)},
            "x_zero_point is torch.int64 of shape .* expected one element of int8",
        ),
        (
            {"x": CODES, "x_scale": None},
            "x is torch.int8 and x_scale is None, expected the scale of the codes",
        ),
        ({"x_scale": None, "x_zero_point": 3}, "x_zero_point is 3 and x_scale is None, expected both"),
        (
            {"x": CODES, "x_zero_point": torch.tensor(1, dtype=torch.uint8)},
            "expected the dtype of x, torch.int8",
        ),
        ({"out_zero_point": 3}, "out_zero_point is 3 and out_scale is None, expected both"),
        ({"out_scale": torch.ones(2)}, r"out_scale has shape \(2,\), expected one element"),
        ({"activation": "silu"}, "activation is 'silu', expected None, 'gelu', 'relu'"),
        ({"bias": torch.ones(5, device="meta")}, "bias is on meta, expected the device of x, cpu"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8_linear(**_small(**changes))


def test_too_many_inputs_for_sums_of_32_bits_are_refused() -> None:
    x, weight = torch.zeros(1, 65537), torch.zeros(1, 65537, dtype=torch.int8)
    with pytest.raises(ValueError, match="weight_int8 has 65537 inputs, expected at most 65536"):
        int8_linear(x, weight, torch.ones(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_is_an_error(backend: str) -> None:
    inputs = _small()
    inputs["x"].requires_grad_()
    with use_backend(backend):
        out = int8_linear(**inputs)
        with pytest.raises(RuntimeError, match="int8_linear has no gradient"):
            out.sum().backward()


ARGUMENTS = (
    *("x", "weight_int8", "weight_scale", "bias", "x_scale", "x_zero_point", "activation"),
    *("out_scale", "out_zero_point"),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "odd", "static_uint8", "codes_to_codes"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name])
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.int8_linear.default, tuple(inputs[n] for n in ARGUMENTS))


class _Mlp(nn.Module):
    """Two layers that hand codes to each other, in every form of scale."""

    def __init__(self) -> None:
        super().__init__()
        first, second = make_inputs(Shape(1, 24, 40)), make_inputs(Shape(1, 40, 24), seed=1)
        for name, inputs in (("first", first), ("second", second)):
            for part in ("weight_int8", "weight_scale", "bias"):
                self.register_buffer(f"{name}_{part}", inputs[part])
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero_point", torch.tensor(9, dtype=torch.uint8))

    def _layer(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"{name}_{part}") for part in ("weight_int8", "weight_scale", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        hidden = int8_linear(
            x, *self._layer("first"), activation="gelu", out_scale=self.scale, out_zero_point=self.zero_point
        )
        out = int8_linear(hidden, *self._layer("second"), x_scale=self.scale, x_zero_point=self.zero_point)
        return int8_linear(out, *self._layer("first"), x_scale=0.05, x_zero_point=-3, activation="relu")


def test_compiles_whole() -> None:
    mlp, x = _Mlp(), image((2, 9, 24))
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), mlp(x))


def test_exports_to_matmulinteger(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    mlp, path = _Mlp().eval(), tmp_path / "mlp.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            mlp,
            (image((2, 9, 24)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    assert [n.op_type for n in program.model.graph].count("MatMulInteger") == 3
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 9, 24), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad(), use_backend("reference"):
            np.testing.assert_allclose(out, mlp(x).numpy(), rtol=1e-4, atol=2e-3)


def test_exports_to_ordinary_operations() -> None:
    mlp, x = _Mlp().eval(), image((2, 9, 24))
    with torch.no_grad(), use_backend("reference"):
        program = torch.export.export(mlp, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert not any("vitzoo" in str(node.target) for node in program.graph.nodes)
        for batch in (2, 3):
            x = image((batch, 9, 24), batch)
            torch.testing.assert_close(program.module()(x), mlp(x), rtol=1e-6, atol=1e-6)


def test_flops_are_counted() -> None:
    inputs = make_inputs(SHAPES["three_axes"])
    with FlopCounterMode(display=False) as counter:
        int8_linear(**inputs)
    with FlopCounterMode(display=False) as matmul:
        nn.functional.linear(inputs["x"], inputs["weight_int8"].float())
    assert counter.get_total_flops() == matmul.get_total_flops() == 2 * 21 * 33 * 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES["odd"], dtype)
    expected = int8_linear(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8_linear(**inputs), expected)


def test_every_backend_gives_its_reason() -> None:
    for backend in operators["int8_linear"].backends:
        reason = backend.why_not()
        assert reason is None or (len(reason) > 20 and not reason.endswith("."))


@needs_extension
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(Shape(250, 70, 140)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(int8_linear(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
def test_eight_threads_at_once() -> None:
    calls = [make_inputs(Shape(60, 40 + i, 50), seed=i) for i in range(8)]
    expected, results = [int8_linear(**inputs) for inputs in calls], [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = int8_linear(**calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


_FORCED = """
import hashlib, torch
from vitzoo.kernels.common import native, triton_support
from vitzoo.kernels.int8_linear import int8_linear
from vitzoo.kernels.int8_linear.inputs import SHAPES, make_inputs
digest = hashlib.sha256()
for shape in SHAPES.values():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for changes in ({}, {"activation": "gelu"}):
            out = int8_linear(**make_inputs(shape, dtype) | changes)
            digest.update(out.contiguous().view(torch.uint8).numpy().tobytes())
for scale in (0.02, None):
    side_by_side = torch.randn(3, 67, 37, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    weight = {k: v for k, v in make_inputs(SHAPES["odd"]).items() if k.startswith("weight")}
    digest.update(int8_linear(side_by_side, **weight, x_scale=scale).numpy().tobytes())
print(native.cpu_isa(), native.cpu_vnni(), digest.hexdigest())
"""


def _in_a_process(isa: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VITZOO_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", _FORCED], capture_output=True, text=True, env=env)


@needs_extension
def test_every_instruction_set_of_this_cpu_gives_the_same_bits() -> None:
    names = ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni")
    digests = {}
    for isa in names:
        done = _in_a_process(isa)
        if done.returncode != 0:
            assert f"VITZOO_CPU_ISA is {isa} but this CPU has only" in done.stderr, done.stderr
            continue
        name, vnni, digests[isa] = done.stdout.split()
        assert (name, vnni) == (isa.removesuffix("_vnni"), str(isa.endswith("_vnni")))
    assert "baseline" in digests
    best = native.cpu_isa() + ("_vnni" if native.cpu_vnni() else "")
    assert best in digests
    assert len(set(digests.values())) == 1, digests
