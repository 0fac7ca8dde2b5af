"""Time every operator's backends and baselines by themselves: `make bench`, `make bench-full`.

Only a backend whose output and gradients are as right as the reference's is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import operator_cases as cases
import pytest
import torch

from vitzoo.kernels.common.backends import operators


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = []
    for name in sorted(operators):
        full = metafunc.config.getoption("full")
        for label in [*cases.shapes_and_inputs(name)[0]] if full else [cases.smallest(name)]:
            for kind in cases.passes(name):
                for candidate in [*cases.backends(name), *cases.baselines(name)]:
                    found.append(
                        pytest.param(name, label, kind, candidate, id=f"{name}-{label}-{kind}-{candidate}")
                    )
    metafunc.parametrize(("name", "label", "kind", "candidate"), found)


@functools.lru_cache(maxsize=1)
def checked_inputs(name: str, label: str) -> dict[str, Any]:
    """Return the inputs of a shape, once every backend has been compared with the reference on them."""
    shapes, make_inputs = cases.shapes_and_inputs(name)
    inputs = make_inputs(shapes[label], torch.float32)
    for backend in cases.backends(name):
        cases.check(name, backend, inputs, differentiable=len(cases.passes(name)) > 1)
    return inputs


def test_operator(benchmark: Any, name: str, label: str, kind: str, candidate: str) -> None:
    call = cases.candidates(name, kind, checked_inputs(name, label))[candidate]
    benchmark.group = f"{name}, {label}, {kind}"
    sizes = vars(cases.shapes_and_inputs(name)[0][label])
    benchmark.extra_info.update(operator=name, shape=label, sizes=sizes, candidate=candidate)
    benchmark.extra_info.update({"pass": kind, "dtype": "float32", "threads": torch.get_num_threads()})
    benchmark(call)
