"""How much memory the scans take beyond inputs and outputs: what C++ allocates shows in the resident set alone.

Run as a script, in a process of its own, it measures: what other tests left in a heap would count too.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import vitzoo
from vitzoo.benchmark.memory import MIB, MemoryUnknownError, peak_of
from vitzoo.kernels.bidirectional_selective_scan import inputs as bidirectional
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.cross_selective_scan import inputs as cross
from vitzoo.kernels.retention import inputs as retention
from vitzoo.kernels.selective_scan import inputs as selective
from vitzoo.kernels.ssd_scan import inputs as ssd
from vitzoo.testing import image

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")

# The states of every token would be 4 to 16 times as much as u.
CASES: dict[str, tuple[str, Callable[..., dict[str, Any]], Any]] = {
    "selective_scan": ("selective_scan", selective.make_inputs, selective.Shape(2, 256, 4096, 16)),
    "few_channels": ("selective_scan", selective.make_inputs, selective.Shape(1, 8, 131072, 4)),
    "bidirectional": (
        "bidirectional_selective_scan",
        bidirectional.make_inputs,
        bidirectional.Shape(4, 256, 2048, 16),
    ),
    "cross": ("cross_selective_scan", cross.make_inputs, cross.Shape(2, 256, 64, 64, 8)),
    "bidirectional_few_channels": (
        "bidirectional_selective_scan",
        bidirectional.make_inputs,
        bidirectional.Shape(1, 64, 8192, 4),
    ),
    "cross_few_channels": ("cross_selective_scan", cross.make_inputs, cross.Shape(1, 64, 128, 64, 4)),
    # heads that share B and C, cut into parts; heads of their own; enough of them to go one by one
    "ssd": ("ssd_scan", ssd.make_inputs, ssd.Shape(1, 8192, 8, 64, 64)),
    "retention": ("retention", retention.make_inputs, retention.Shape(2, 4096, 4, 64, 64)),
    "retention_by_heads": ("retention", retention.make_inputs, retention.Shape(4, 2048, 16, 32, 32)),
}
DIRECT = ("selective_scan", "few_channels", "ssd", "retention", "retention_by_heads")


DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}


def _leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _taken(work: Callable[[], Any], bound: float) -> float:
    """Return the bytes that a piece of work holds at its peak beyond what it returns.

    A system that moves pages out and in meanwhile only adds to that: above the bound the least of several tries counts.
    """
    least = math.inf
    for _ in range(5):
        least = min(least, _taken_once(work))
        if least < bound:
            break
    return least


def _taken_once(work: Callable[[], Any]) -> int:
    held: list[Any] = []
    before = peak_of(lambda: None, "cpu")
    peak = peak_of(lambda: held.append(work()), "cpu")
    return peak - before - _bytes(held[0] if isinstance(held[0], tuple) else (held[0],))


def _rows(inputs: dict[str, Any]) -> int:
    return sum(x.numel() for k, x in inputs.items() if k in ("B", "C", "B_b", "C_b"))


def _at_most_4(sizes: dict[str, Any]) -> dict[str, Any]:
    return {k: min(v, 4) if type(v) is int else v for k, v in sizes.items()}


def _states() -> dict[str, float]:
    given = selective.make_inputs(CASES["selective_scan"][2])
    taken = _taken_once(lambda: (given["delta"].unsqueeze(-1) * given["A"].unsqueeze(1)).sum(-1))
    return {"taken": taken, "u": _bytes([given["u"]])}


def _passes(case: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the bytes taken by either pass and their bounds."""
    name, make_inputs, shape = CASES[case]
    function = getattr(vitzoo.kernels, name)
    with use_backend("cpu"):
        small = _leaves(make_inputs(type(shape)(**_at_most_4(vars(shape))), dtype))
        function(**small).sum().backward()  # what the first call of a process loads
        inputs = _leaves(make_inputs(shape, dtype))
        # B and C are brought to float32, and to the order of a route
        rows = 0 if case in DIRECT and dtype == torch.float32 else 4 * _rows(inputs)
        bounds = {"forward_bound": rows + 3 * MIB}
        with torch.no_grad():
            forward = _taken(lambda: function(**inputs), bounds["forward_bound"])
        out = function(**inputs)
        dout = image(out.shape, 7).to(dtype)
        wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        # all inputs in float32, as sums are
        bounds["backward_bound"] = 4 * sum(x.numel() for x in wanted) + 2 * MIB
        gradients = lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)  # noqa: E731
        return {"forward": forward, "backward": _taken(gradients, bounds["backward_bound"]), **bounds}


def main() -> None:
    torch.set_num_threads(1)  # each has scratch memory of its own
    try:
        found: dict[str, Any] = {"states": _states()}
        for case in CASES:
            found[case] = {name: _passes(case, dtype) for name, dtype in DTYPES.items()}
    except MemoryUnknownError as error:
        found = {"unknown": str(error)}
    print(json.dumps(found))


# glibc keeps what it frees of smaller blocks than a threshold that grows: how much, says the heap's history. With a
# fixed one each block is mapped by itself and given back at once.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, **MAPPED, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "unknown" in found:
        pytest.skip(found["unknown"])
    return found


def test_the_states_of_every_token_would_show(measured: dict[str, Any]) -> None:
    assert measured["states"]["taken"] > 15 * measured["states"]["u"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_scans_take_little_beyond_inputs_and_outputs(measured: dict[str, Any], case: str, dtype: str) -> None:
    found = measured[case][dtype]
    for kind in ("forward", "backward"):
        taken, bound = found[kind], found[f"{kind}_bound"]
        assert taken < bound, f"{kind}: {taken / MIB:.1f} MiB, expected less than {bound / MIB:.1f}"


if __name__ == "__main__":
    main()
