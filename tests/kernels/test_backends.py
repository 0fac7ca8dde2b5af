"""How an operator chooses its backend, and what it says when the choice is poor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from vitzoo.kernels.common import backends, native
from vitzoo.kernels.common.backends import (
    Backend,
    BackendError,
    Operator,
    SlowBackendWarning,
    forced_backend,
    use_backend,
)


def _run(code: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(backends, "operators", {})
    monkeypatch.setattr(backends, "_warned", False)
    return Operator(
        "double",
        (
            Backend("cuda", {"forward": lambda x: 2 * x}, lambda *args: "there is no GPU"),
            Backend(
                "cpu",
                {"forward": lambda x: 2 * x},
                lambda *args: "x is odd" if args and args[0] % 2 else None,
            ),
            Backend("reference", {"forward": lambda x: x + x}, lambda *args: None),
        ),
    )


def test_the_first_backend_without_a_reason_runs(operator: Operator) -> None:
    chosen = operator.choose(4)
    assert (chosen.name, chosen.run["forward"](4)) == ("cpu", 8)


def test_falling_back_to_the_reference_is_said_once_with_the_reasons(operator: Operator) -> None:
    with pytest.warns(
        SlowBackendWarning, match=r"double in plain torch ops.*cuda: there is no GPU; cpu: x is odd"
    ):
        assert operator.choose(3).run["forward"](3) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert operator.choose(3).name == "reference"


def test_asking_for_the_reference_warns_of_nothing(operator: Operator) -> None:
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        assert operator.choose(3).name == "reference"


def test_a_forced_backend_never_falls_back(operator: Operator) -> None:
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match=r"'cuda' was asked for but .* there is no GPU"),
    ):
        operator.choose(4)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="no such backend, only cuda, cpu, reference"),
    ):
        operator.choose(4)


def test_no_backend_at_all_lists_every_reason() -> None:
    lonely = Operator("lonely", (Backend("cpu", {}, lambda *args: "it is Sunday"),))
    backends.operators.pop("lonely")
    with pytest.raises(BackendError, match="no backend can run lonely: cpu: it is Sunday"):
        lonely.choose()


def test_use_backend_nests_and_belongs_to_its_thread() -> None:
    seen: list[str | None] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
        with use_backend(None):
            seen.append(forced_backend())
        seen.append(forced_backend())
    assert seen == [None, None, "reference"]


def test_without_the_extension_the_scan_runs_and_says_so_once() -> None:
    code = """
import sys, warnings
sys.modules["vitzoo._C"] = None  # importing it fails as if it had not been built
import vitzoo
from vitzoo.kernels.selective_scan.inputs import SHAPES, make_inputs
inputs = make_inputs(SHAPES["tiny"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = vitzoo.kernels.selective_scan(**inputs)
    second = vitzoo.kernels.selective_scan(**inputs)
with vitzoo.use_backend("reference"):
    expected = vitzoo.kernels.selective_scan(**inputs)
assert (first == expected).all() and (second == expected).all()
slow = [str(w.message) for w in caught if w.category.__name__ == "SlowBackendWarning"]
assert len(slow) == 1 and "C++ extension was not built" in slow[0] and "--no-build-isolation" in slow[0], slow
"""
    _run(code)


def test_an_extension_of_older_sources_is_said_to_lack_each_operator_that_a_kernel_calls() -> None:
    code = """
import sys, types
sys.modules["vitzoo._C"] = types.ModuleType("vitzoo._C")  # loads, but registers no operator
import vitzoo
from vitzoo.kernels.common.backends import operators
with vitzoo.use_backend("cuda"):
    for operator in operators.values():
        for backend in operator.backends:
            if backend.name in ("cpu", "cuda"):
                print(operator.name, backend.name, backend.why_not(), sep="|")
"""
    told = [line.split("|") for line in _run(code, VITZOO_CUDA_ON_CPU="1").splitlines()]
    lacking = {
        (name, backend): set(re.findall(r"\w+", why.split("lacks")[1].split(":")[0]))
        for name, backend, why in told
    }
    assert all("built from older sources and lacks" in why and "make build" in why for *_, why in told)
    assert lacking["add_rms_norm", "cpu"] == {"add_norm_fwd", "add_norm_bwd"}
    assert lacking["bidirectional_selective_scan", "cpu"] == {"routed_scan_fwd", "routed_scan_bwd"}
    assert lacking["selective_scan", "cuda"] == {"selective_scan_cuda_fwd", "selective_scan_cuda_bwd"}
    called: set[str] = set()
    for path in Path(backends.__file__).parents[1].rglob("*.py"):
        called |= set(re.findall(r"torch\.ops\.vitzoo_native\.(\w+)\(", path.read_text()))
    assert len(called) > 30
    assert set().union(*lacking.values()) == called - {
        "cpu_isa",
        "cpu_vnni",
        "scan_exponentials",
    }  # no kernels of operators


def test_an_operator_that_an_older_extension_lacks_runs_in_torch_ops_and_says_why() -> None:
    code = """
import sys, types, warnings
sys.modules["vitzoo._C"] = types.ModuleType("vitzoo._C")
import vitzoo
from vitzoo.doctor import diagnose
from vitzoo.kernels.selective_scan.inputs import SHAPES, make_inputs
inputs = make_inputs(SHAPES["tiny"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = vitzoo.kernels.selective_scan(**inputs)
with vitzoo.use_backend("reference"):
    assert (out == vitzoo.kernels.selective_scan(**inputs)).all()
with vitzoo.use_backend("cpu"):
    try:
        vitzoo.kernels.selective_scan(**inputs)
    except RuntimeError as error:
        print(error)
print(*(w.message for w in caught if w.category.__name__ == "SlowBackendWarning"))
print(next(e for e in diagnose()["operators"] if e["operator"] == "selective_scan")["backends"]["cpu"])
"""
    refused, warned, doctor = _run(code).splitlines()
    for line in (refused, warned, doctor):
        assert "lacks selective_scan_fwd, selective_scan_bwd: run `make build`" in line


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_the_cuda_extension_is_said_to_lack_what_it_has_no_kernel_for() -> None:
    reason = native.cuda_extension_why_not()
    if reason is not None:
        pytest.skip(reason)
    assert native.cuda_extension_why_not("selective_scan_cuda_fwd") is None
    reason = native.cuda_extension_why_not("selective_scan_fwd", "selective_scan_cuda_fwd")
    assert "CUDA extension was built from older sources and lacks selective_scan_fwd:" in str(reason)


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_the_chosen_instruction_set_has_a_name() -> None:
    assert native.cpu_isa() in ("baseline", "avx2", "avx512")
