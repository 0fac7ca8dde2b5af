"""What every operator owes, whichever it is: threads, processes, backends that say why not."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vitzoo
from vitzoo.kernels.common import backends, native, triton_support
from vitzoo.kernels.common.backends import NAMES, operators, use_backend
from vitzoo.testing import assert_backend_close, outputs_and_gradients

OPERATORS = sorted(operators)
WITH_GRADIENTS_IN_CPP = [
    name
    for name in OPERATORS
    if hasattr(torch.ops.vitzoo, f"{name}_bwd") and "cpu" in [b.name for b in operators[name].backends]
]
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
needs_extension = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")


def _folder(name: str) -> str:
    return _module(name).rsplit(".", 1)[0]


def _module(name: str) -> str:
    """Return the module that defines the operator's public function."""
    return getattr(vitzoo.kernels, name).__module__


def _inputs(name: str, label: str | None = None) -> dict[str, Any]:
    """Return the arguments of a call: of the largest of the operator's test shapes, unless one is named."""
    module = importlib.import_module(f"{_folder(name)}.inputs")
    make = getattr(module, f"make_{name}_inputs", None) or module.make_inputs
    shapes = getattr(module, f"{name.upper()}_SHAPES", None) or module.SHAPES
    if label is not None:
        return make(shapes[label])
    calls = [make(shape) for shape in shapes.values()]
    return max(calls, key=lambda c: sum(v.numel() for v in c.values() if isinstance(v, Tensor)))


def _results(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    differentiable = hasattr(torch.ops.vitzoo, f"{name}_bwd")
    return outputs_and_gradients(
        getattr(vitzoo.kernels, name), inputs, () if differentiable else tuple(inputs)
    )


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", OPERATORS)
def test_backends_are_in_order_and_say_why_not(name: str) -> None:
    names = [backend.name for backend in operators[name].backends]
    assert names == [known for known in NAMES if known in names]
    assert names[-1] == "reference"
    for backend in operators[name].backends:
        reason = backend.why_not()
        assert reason is None or (len(reason) > 15 and not reason.endswith("."))


class _Calls(TorchDispatchMode):
    """Records the arguments with which an operator of ours is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.arguments = f"vitzoo::{name}", ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == self.name:
            self.arguments = args
        return func(*args, **(kwargs or {}))


def test_a_gpu_without_triton_and_cuda_kernels_gets_torch_ops_and_one_warning(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.setattr(triton_support, "_missing", lambda: "Triton is not installed (pip install triton)")
    monkeypatch.setattr(native, "_no_gpu", lambda index: None)
    monkeypatch.setattr(native, "cuda_extension_why_not", lambda *names: "the CUDA extension was not built")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in sorted(OPERATORS, key=lambda name: name != "selective_scan"):
            with torch.no_grad(), use_backend("reference"), _Calls(name) as calls:
                getattr(vitzoo.kernels, name)(**_inputs(name))
            with FakeTensorMode():  # a GPU's tensors without a GPU
                arguments = tree_map_only(
                    Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), calls.arguments
                )
            assert arguments[0].device.type == "cuda"
            assert operators[name].choose(*arguments).name == "reference", name
    (said,) = [str(w.message) for w in caught if w.category is backends.SlowBackendWarning]
    assert "runs selective_scan in plain torch ops" in said
    for reason in (
        "cuda: the CUDA extension was not built",
        "triton: Triton is not",
        "cpu: it runs on the CPU",
    ):
        assert reason in said


@needs_extension
@pytest.mark.parametrize("name", OPERATORS)
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    inputs, threads = _inputs(name), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _results(name, inputs)
        torch.set_num_threads(2)
        two = _results(name, inputs)
    finally:
        torch.set_num_threads(threads)
    _same(two, one)


@needs_extension
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", WITH_GRADIENTS_IN_CPP)
def test_every_instruction_set_is_as_close_as_the_reference(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(native.cpu_isa() or "baseline"):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("VITZOO_CPU_ISA", isa)
    assert native.cpu_isa() == isa
    assert_backend_close(getattr(vitzoo.kernels, name), _inputs(name), "cpu", use_backend)


@needs_extension
@pytest.mark.parametrize("name", OPERATORS)
def test_eight_threads_at_once(name: str) -> None:
    inputs = _inputs(name)
    expected = _results(name, inputs)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: _results(name, inputs), range(16)):
            _same(found, expected)


def test_two_processes_import_and_run_at_once() -> None:
    code = """
import torch, vitzoo
from vitzoo.kernels.selective_scan.inputs import SHAPES, make_inputs
print(float(vitzoo.kernels.selective_scan(**make_inputs(SHAPES["odd"])).double().sum()))
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        for _ in range(2)
    ]
    sums = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert float(sums[0]) == float(sums[1])
