"""How an operator chooses its backend, and what it says when the choice is poor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
def test_the_chosen_instruction_set_has_a_name() -> None:
    assert native.cpu_isa() in ("baseline", "avx2", "avx512")
