"""The selective scan in Triton, in its interpreter without a GPU: all forms, both ways of walking the chunks."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import math
from typing import Any

import pytest
from torch import Tensor

from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.kernels.selective_scan import selective_scan
from vitzoo.kernels.selective_scan.inputs import SHAPES, Shape, make_inputs
from vitzoo.testing import (
    assert_backend_close,
    assert_golden,
    golden_tensor,
    gpu_or_cpu,
    image,
    load_golden,
    relative_difference,
)

pytest.importorskip("triton")
from vitzoo.kernels.common import scan_triton

DEVICE = gpu_or_cpu()[-1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With chunks of 16 tokens: one to six chunks, all forms of B and C, and too few or enough programs for a walk in turn.
CHUNKED = {
    "at_once": Shape(1, 5, 37, 3),
    "in_turn": Shape(2, 16, 35, 2),
    "groups": Shape(1, 8, 33, 2, groups=2, has_z=False),
    "constant": Shape(1, 5, 35, 2, groups=-1),
    "plain": Shape(1, 3, 90, 1, has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False),
    "whole": Shape(1, 4, 32, 2),
}


def _goldens() -> list[Any]:
    """Return the cases with real A; the interpreter takes minutes for the largest."""
    cases = [c for c in load_golden("ops/selective_scan")["cases"] if c["A"] == "real"]
    sizes = [math.prod(c["inputs"]["u"]["shape"]) * c["inputs"]["A"]["shape"][1] for c in cases]
    slow = [[pytest.mark.slow] if size > 4000 else [] for size in sizes]
    return [pytest.param(c, marks=mark, id=c["id"]) for c, mark in zip(cases, slow, strict=True)]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Cut chunks of 16 tokens, and list the kernels launched."""
    found: list[tuple[str, dict[str, Any]]] = []
    launch = scan_triton._launch

    def recorded(kernel: Any, grid: Any, device: Any, arguments: dict[str, Any], *warps: int) -> None:
        found.append((kernel.__name__, arguments))
        launch(kernel, grid, device, arguments, *warps)

    monkeypatch.setattr(scan_triton, "tile", lambda *args: (4, 16))
    monkeypatch.setattr(scan_triton, "_processors", lambda device: 4)
    monkeypatch.setattr(scan_triton, "_launch", recorded)
    return found


@pytest.mark.parametrize("case", _goldens())
def test_goldens(case: dict[str, Any]) -> None:
    inputs = {k: golden_tensor(v).to(DEVICE).requires_grad_() for k, v in case["inputs"].items()}
    with use_backend("triton"):
        out, last = selective_scan(**inputs, **case["options"], return_last_state=True)
        (out * image(out.shape, 7).to(DEVICE)).sum().backward()
    assert_golden(out, case["outputs"]["out"], 1e-5, "out")
    assert_golden(last, case["outputs"]["last_state"], 1e-5, "last_state")
    for name, recorded in case["grads"].items():
        if any(recorded["values"]):
            assert_golden(inputs[name].grad, recorded, 1e-5, f"gradient of {name}")
        else:  # A of a single token
            assert float(inputs[name].grad.abs().max()) < 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "one_token", "plain", "one_state"])
def test_as_close_as_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[name], dtype, DEVICE) | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "triton", use_backend)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CHUNKED), *(("at_once", dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_chunks_join(name: str, dtype: torch.dtype, launched: list[tuple[str, dict[str, Any]]]) -> None:
    inputs = make_inputs(CHUNKED[name], dtype, DEVICE) | {"return_last_state": True}
    assert_backend_close(selective_scan, inputs, "triton", use_backend)
    (walk,) = [arguments["SEQUENTIAL"] for kernel, arguments in launched if kernel == "_scan_fwd_kernel"]
    assert walk == (name == "in_turn")


def test_what_the_backward_pass_keeps_is_bounded(launched: list[tuple[str, dict[str, Any]]]) -> None:
    shape = CHUNKED["at_once"]
    inputs = {
        k: v.requires_grad_() if isinstance(v, Tensor) else v
        for k, v in make_inputs(shape, device=DEVICE).items()
    }
    with use_backend("triton"):
        selective_scan(**inputs).sum().backward()
    everything = shape.batch * shape.dim * shape.seqlen * shape.dstate
    for _, arguments in launched:
        for name, value in arguments.items():
            assert not isinstance(value, Tensor) or value.numel() <= everything / 2, name


def test_non_contiguous_inputs_are_read_as_they_are() -> None:
    inputs = make_inputs(Shape(2, 6, 19, 3, groups=2), device=DEVICE)
    strided = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, Tensor) and v.ndim > 1 else v
        for k, v in inputs.items()
    }
    with use_backend("triton"):
        torch.testing.assert_close(selective_scan(**strided), selective_scan(**inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_inputs_stay_finite(dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(1, 8, 40, 4), dtype, DEVICE)
    for name, largest in (("u", 50), ("z", 120)):
        inputs[name] = inputs[name] / inputs[name].abs().max() * largest
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with use_backend("triton"):
        out = selective_scan(**leaves)
        (out.float() * 1e-3).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("bias", [-30.0, -12.0, -1.0, 1.0, 19.9, 20.1, 60.0])
def test_softplus_is_exact_to_rounding(bias: float) -> None:
    # one token with A = 0, B = C = 1: the output is softplus(bias) u
    inputs = {
        "u": torch.ones(1, 1, 1, device=DEVICE),
        "delta": torch.full((1, 1, 1), bias, device=DEVICE),
        "A": torch.zeros(1, 1, device=DEVICE),
        "B": torch.ones(1, 1, 1, device=DEVICE),
        "C": torch.ones(1, 1, 1, device=DEVICE),
    }
    with use_backend("triton"):
        out = selective_scan(**inputs, delta_softplus=True)
    exact = torch.nn.functional.softplus(torch.tensor(bias, dtype=torch.float64)).view(1, 1, 1)
    assert relative_difference(out, exact) < 3e-7


def test_float64_is_refused_with_the_reason() -> None:
    inputs = make_inputs(SHAPES["tiny"], torch.float64, DEVICE)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=r"u is torch\.float64, not float32, bfloat16"),
    ):
        selective_scan(**inputs)


# opcheck itself looks at the gradient of clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    inputs = make_inputs(Shape(1, 2, 5, 2, groups=2), device=DEVICE)
    inputs = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.vitzoo.selective_scan.default, tuple(inputs[n] for n in names))
