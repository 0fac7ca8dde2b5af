"""Window attention: every backend against the reference, the reference against timm's and HiLo's layers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.benchmark.flop_formulas import kind
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.kernels.window_attention import cuda, window_attention
from vitzoo.kernels.window_attention.inputs import BASELINES, MODEL_SHAPES, SHAPES, Shape, make_inputs
from vitzoo.kernels.window_attention.reference import window_attention_reference
from vitzoo.testing import FLOORS, assert_backend_close, image, outputs_and_gradients, relative_difference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
# the CUDA kernels run here in their host form; they take no float64
FLOAT32_BACKENDS = [*BACKENDS, pytest.param("cuda", marks=needs_extension)]
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# few windows each: the interpreter takes its time
TRITON_SHAPES = {
    "one_token": SHAPES["one_token"],
    "hifi_padded": Shape(1, 3, 3, 2, 8, 2, has_pad=True),
    "swin_padded": Shape(1, 5, 6, 2, 4, 4, 2, has_bias=True, has_pad=True),
    "rolled_first": Shape(2, 5, 4, 1, 20, 4, 2, has_bias=True, has_pad=True, roll_before_pad=True),
    "one_axis": Shape(1, 3, 5, 1, 6, (3, 4), (1, 0)),
    "two_blocks": Shape(1, 9, 9, 1, 5, 9, 4, has_bias=True),
}


@pytest.fixture(autouse=True)
def _cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITZOO_CUDA_ON_CPU", "1")


@needs_extension
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cpu_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(window_attention, make_inputs(shape, dtype), "cpu", use_backend)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TRITON_SHAPES.values(), ids=TRITON_SHAPES)
def test_triton_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, DEVICE)
    assert_backend_close(window_attention, inputs, "triton", use_backend)


@needs_triton
def test_triton_takes_no_float64() -> None:
    inputs = make_inputs(next(iter(SHAPES.values())), torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="float64, not float32, bfloat16 or float16"),
    ):
        window_attention(**inputs)


@needs_extension
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_on_the_host_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(window_attention, make_inputs(shape, dtype), "cuda", use_backend)


# warps a window, windows one after the other, in every mixture
@needs_extension
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 100])
@pytest.mark.parametrize("name", ["hifi_bias", "swin_padded", "rolled_first"])
def test_cuda_on_the_host_cuts_the_work_in_any_way(
    warps: int, count: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "warps_per_item", lambda area: warps)
    monkeypatch.setattr(cuda, "windows_per_part", lambda *sizes: count)
    assert_backend_close(window_attention, make_inputs(SHAPES[name]), "cuda", use_backend)


@needs_extension
def test_cuda_on_the_host_has_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "windows_per_part", lambda *sizes: 2)
    inputs, results = make_inputs(SHAPES["swin_padded"]), []
    for order in ("forward", "reverse", "shuffled"):
        monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", order)
        with use_backend("cuda"):
            results.append(outputs_and_gradients(window_attention, inputs))
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


@needs_extension
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (SHAPES["hifi"], torch.float64, "qkv is torch.float64, not float32"),
        (Shape(1, 17, 17, 1, 4, 17), torch.float32, "a window of 289 tokens is larger than 256"),
        (Shape(1, 16, 16, 1, 64, 16), torch.float32, "256 tokens with head_dim 64 exceeds a block's shared"),
    ],
    ids=["float64", "window", "memory"],
)
def test_cuda_refuses(shape: Shape, dtype: torch.dtype, message: str) -> None:
    with use_backend("cuda"), pytest.raises(BackendError, match=message):
        window_attention(**make_inputs(shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *MODEL_SHAPES.values()], ids=[*SHAPES, *MODEL_SHAPES])
def test_cuda_is_as_close_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    assert_backend_close(window_attention, make_inputs(shape, dtype, "cuda"), "cuda", use_backend)


def _by_token(inputs: dict[str, Any], shift_first: bool = False) -> Tensor:
    """Attend one query at a time, from the definition: which keys share its window and its side of the map."""
    qkv, heads = inputs["qkv"].double(), inputs["num_heads"]
    batch, height, width, tripled = qkv.shape
    window, shift = inputs["window_size"], inputs["shift_size"]
    full = [-(-size // window) * window for size in (height, width)]

    def source(i: int, size: int, padded: int) -> int | None:
        """Where coordinate i of the rolled map comes from."""
        if shift_first:
            return (i + shift) % size if i < size else None
        at = (i + shift) % padded
        return at if at < size else None

    def side(i: int, padded: int) -> bool:
        return i >= padded - shift if shift else False

    out = torch.zeros(batch, height, width, tripled // 3, dtype=torch.float64)
    cells = [(i, j) for i in range(full[0]) for j in range(full[1])]
    places = {(i, j): (source(i, height, full[0]), source(j, width, full[1])) for i, j in cells}
    value = {
        c: qkv[:, p[0], p[1]] if None not in p else inputs["pad_qkv"].double() for c, p in places.items()
    }
    value = {c: v.expand(batch, tripled).unflatten(1, (3, heads, -1)) for c, v in value.items()}
    for i, j in cells:
        if None in places[i, j]:
            continue
        corner = (i - i % window, j - j % window)
        keys, rows = [], []
        for n in range(window * window):
            cell = (corner[0] + n // window, corner[1] + n % window)
            if all(side(a, f) == side(b, f) for a, b, f in zip((i, j), cell, full, strict=True)):
                keys.append(cell)
                rows.append(n)
        bias = inputs["attn_bias"].double()[:, (i - corner[0]) * window + j - corner[1]][:, rows]
        k, v = (torch.stack([value[c][:, w] for c in keys], 2) for w in (1, 2))  # (B, heads, keys, head_dim)
        scores = (value[i, j][:, 0].unsqueeze(2) * k).sum(-1) * k.shape[-1] ** -0.5 + bias
        result = (scores.softmax(-1).unsqueeze(-1) * v).sum(2)
        out[:, places[i, j][0], places[i, j][1]] = result.flatten(1)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["swin_padded", "rolled_first", "hifi_bias_1"])
def test_is_attention_of_one_query_at_a_time(name: str, backend: str) -> None:
    shape = Shape(1, 6, 5, 3, 5, 2, 1, has_bias=True, has_pad=True) if name == "hifi_bias_1" else SHAPES[name]
    inputs = make_inputs(shape, torch.float64)
    with use_backend(backend):
        out = window_attention(**inputs)
    assert relative_difference(out, _by_token(inputs, shape.roll_before_pad)) < 1e-12


class _Inner(nn.Module):
    """A timm WindowAttention's or LocallyGroupedAttn's projections around the operator."""

    def __init__(self, attn: nn.Module, bias: Tensor | None, **options: Any) -> None:
        super().__init__()
        self.attn, self.bias, self.options = attn, bias, options

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        x = window_attention(
            attn.qkv(x),
            attn.num_heads,
            attn_bias=self.bias,
            pad_qkv=attn.qkv.bias,
            **self.options,
        )
        return attn.proj(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(14, 21), (15, 10)], ids=["whole", "padded"])
@pytest.mark.parametrize("shift", [0, 3])
def test_swin_is_timms(size: tuple[int, int], shift: int, backend: str) -> None:
    torch.manual_seed(0)
    block = SwinTransformerBlock(24, size, num_heads=3, window_size=7, shift_size=shift).double().eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.bias)
    x = image((2, *size, 24)).double()
    bias = block.attn._get_rel_pos_bias()[0]
    ours = _Inner(block.attn, bias, window_size=7, shift_size=shift, roll_before_pad=True)
    with use_backend(backend):
        # timm's mask is -100 where ours is -inf
        assert relative_difference(ours(x), block._attn(x)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(14, 7), (12, 10)], ids=["whole", "padded"])
def test_twins_is_timms(size: tuple[int, int], backend: str) -> None:
    torch.manual_seed(0)
    attn = LocallyGroupedAttn(24, num_heads=3, ws=7).double().eval()
    x = image((2, *size, 24)).double()
    with use_backend(backend):
        out = _Inner(attn, None, window_size=7)(x)
    assert relative_difference(out.flatten(1, 2), attn(x.flatten(1, 2), size)) < 1e-12


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("shift", [0, 3])
def test_the_benchmarks_baselines_compute_the_same(baseline: str, shift: int) -> None:
    inputs = make_inputs(Shape(2, 14, 21, 3, 8, 7, shift, has_bias=True))
    assert relative_difference(BASELINES[baseline](**inputs), window_attention_reference(**inputs)) < 1e-6


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_non_contiguous_inputs(backend: str) -> None:
    inputs = make_inputs(SHAPES["swin_padded"])
    qkv = inputs["qkv"]
    strided = {
        "channels first": qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "columns first": qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "a slice": torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]],
        "every other row": qkv.repeat_interleave(2, 1)[:, ::2],
    }
    bias = inputs["attn_bias"].mT.contiguous().mT
    with use_backend(backend):
        expected = window_attention(**inputs)
        for name, x in strided.items():
            assert not x.is_contiguous()
            out = window_attention(**{**inputs, "qkv": x, "attn_bias": bias})
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_empty_batch(backend: str) -> None:
    inputs = make_inputs(Shape(0, 6, 5, 2, 4, 4, 1, has_bias=True, has_pad=True))
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = window_attention(**leaves)
        out.sum().backward()
    assert out.shape == (0, 6, 5, 8)
    assert not leaves["attn_bias"].grad.any()


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_inputs_stay_finite(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES["swin"], dtype)
    # scores up to 10^4, beyond what float16 holds when they are summed in it
    inputs["qkv"] = inputs["qkv"] * 50
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        out = window_attention(**leaves)
        out.float().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(leaves["qkv"].grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_may_exclude_keys(backend: str) -> None:
    inputs = make_inputs(SHAPES["swin"], torch.float64)
    area = 49
    mask = torch.ones(area, area, dtype=torch.bool).tril()
    inputs["attn_bias"] = inputs["attn_bias"].masked_fill(~mask, float("-inf"))
    inputs["shift_size"] = 0
    with use_backend(backend):
        out = window_attention(**inputs)
    q, k, v = inputs["qkv"][0, :7, :7].reshape(area, 3, 2, 8).permute(1, 2, 0, 3)
    bias = inputs["attn_bias"]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert relative_difference(out[0, :7, :7].reshape(area, 2, 8).transpose(0, 1), expected) < 1e-12


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_nan_stays_in_its_window_and_does_not_vanish(backend: str) -> None:
    inputs = make_inputs(Shape(1, 14, 14, 2, 8, 7))
    inputs["qkv"][0, 8, 2, 16 + 3] = float("nan")  # a key of head 0
    with use_backend(backend):
        out = window_attention(**inputs)
    expected = torch.zeros(1, 14, 14, 16, dtype=torch.bool)
    expected[:, 7:, :7, :8] = True
    assert torch.equal(out.isnan(), expected)


def _small(**changes: Any) -> dict[str, Any]:
    return {**make_inputs(Shape(2, 5, 6, 2, 4, 3, 1, has_bias=True, has_pad=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(2, 30, 24)}, r"qkv has shape \(2, 30, 24\), expected \(B, H, W, 3\*C\)"),
        ({"qkv": torch.zeros(2, 5, 6, 25)}, r"qkv has shape .* C a multiple of num_heads 2"),
        ({"qkv": torch.zeros(2, 5, 6, 24, dtype=torch.int32)}, "qkv is torch.int32, expected a floating"),
        ({"num_heads": 0}, "num_heads is 0, expected a positive number"),
        ({"window_size": 0}, r"window_size is \(0, 0\), expected positive numbers"),
        ({"window_size": (3, 3, 3)}, r"window_size is \(3, 3, 3\), expected an integer or two"),
        ({"window_size": 2.5}, "window_size is 2.5, expected an integer or two"),
        ({"shift_size": 3}, r"shift_size is \(3, 3\), expected 0 <= shift < window_size \(3, 3\)"),
        ({"shift_size": (-1, 0)}, r"shift_size is \(-1, 0\)"),
        ({"attn_bias": torch.zeros(2, 9, 8)}, r"attn_bias has shape .* \(num_heads, M, M\) = \(2, 9, 9\)"),
        ({"attn_bias": torch.zeros(2, 9, 9, device="meta")}, "attn_bias is on meta, expected the device of"),
        ({"pad_qkv": torch.zeros(8)}, r"pad_qkv has shape \(8,\), expected \(3\*C,\) = \(24,\)"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_refused_inputs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_attention(**_small(**changes))


NAMES = (
    "qkv",
    "num_heads",
    "window_size",
    "shift_size",
    "attn_bias",
    "scale",
    "pad_qkv",
    "roll_before_pad",
)


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hifi", "swin_padded", "one_axis"])
def test_opcheck(name: str, backend: str) -> None:
    inputs = make_inputs(SHAPES[name], torch.float64) | {"scale": 0.3}
    for key in ("window_size", "shift_size"):
        value = inputs[key]
        inputs[key] = [value, value] if isinstance(value, int) else list(value)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend(backend):
        torch.library.opcheck(torch.ops.vitzoo.window_attention.default, tuple(inputs[n] for n in NAMES))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 2, 4, 1, 3, 2),
        Shape(1, 3, 4, 2, 2, 3, 1, has_bias=True, has_pad=True),
        Shape(1, 4, 3, 1, 2, (2, 3), (1, 0), has_bias=True, has_pad=True, roll_before_pad=True),
    ],
    ids=["plain", "swin", "oblong"],
)
def test_gradcheck(shape: Shape, backend: str) -> None:
    inputs = make_inputs(shape, torch.float64) | {"scale": 0.7}
    names = [k for k, v in inputs.items() if isinstance(v, Tensor)]

    def attend(*tensors: Tensor) -> Tensor:
        return window_attention(**{**inputs, **dict(zip(names, tensors, strict=True))})

    with use_backend(backend):
        assert torch.autograd.gradcheck(attend, [inputs[k].requires_grad_() for k in names])


def test_second_derivatives_are_refused() -> None:
    inputs = _small()
    qkv = inputs.pop("qkv").requires_grad_()
    out = window_attention(qkv, **inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 9, 9))

    def forward(self, x: Tensor) -> Tensor:  # (B, 5, 7, 8)
        return window_attention(self.qkv(x), 2, 3, 1, self.bias, pad_qkv=self.qkv.bias)


def test_compiles_whole_forward_and_backward() -> None:
    torch.manual_seed(0)
    layer, x = _Layer(), image((2, 5, 7, 8))
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
            (image((2, 5, 7, 8)),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=20,
            verbose=False,
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = image((batch, 5, 7, 8), batch)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, layer(x).numpy(), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_references_products() -> None:
    inputs = make_inputs(SHAPES["swin_padded"])
    with FlopCounterMode(display=False) as expected:
        window_attention_reference(**inputs)
    with FlopCounterMode(display=False) as counter:
        window_attention(**inputs)
    assert counter.get_total_flops() == expected.get_total_flops() == 4 * 10 * 15 * 25 * 8
    inputs["qkv"].requires_grad_()
    out = window_attention(**inputs)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # five products where the forward pass has two
    assert counter.get_total_flops() == 5 * expected.get_total_flops() // 2
    assert kind(torch.ops.vitzoo.window_attention, by_weight=False) == "attention"


def test_autocast_runs_in_its_dtype() -> None:
    layer = _Layer()
    x = image((2, 5, 7, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        raw = window_attention(**_small())
    assert out.dtype == raw.dtype == torch.bfloat16
    assert relative_difference(out, layer(x)) < 2e-2
    out.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32


_FORCED = """
import torch
from vitzoo.kernels.common import native
from vitzoo.kernels.window_attention import window_attention
from vitzoo.kernels.window_attention.inputs import SHAPES, make_inputs
from vitzoo.testing import outputs_and_gradients
print(native.cpu_isa())
for name in ("swin_padded", "hifi_padded", "hifi_bias", "large"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        results = outputs_and_gradients(window_attention, make_inputs(SHAPES[name], dtype))
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
def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(SHAPES["rolled_first"]), torch.get_num_threads(), []
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = window_attention(**inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
