"""Time every layer of vitzoo.layers, and what it is compared with, by itself: `make bench`, `make bench-full`."""

from __future__ import annotations

import functools
from typing import Any

import layer_cases
import pytest
import torch

PASSES = ("forward", "forward+backward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found: list[Any] = []
    seen: set[str] = set()
    for case in layer_cases.cases():
        if case.layer in seen and not metafunc.config.getoption("full"):
            continue
        seen.add(case.layer)
        for kind in PASSES:
            for candidate in case.make():
                found.append(
                    pytest.param(case, kind, candidate, id=f"{case.layer}-{case.label}-{kind}-{candidate}")
                )
    metafunc.parametrize(("case", "kind", "candidate"), found)


@functools.lru_cache(maxsize=1)
def candidates(case: layer_cases.Case) -> dict[str, layer_cases.Candidate]:
    torch.manual_seed(0)
    return case.make()


def test_layer(benchmark: Any, case: layer_cases.Case, kind: str, candidate: str) -> None:
    chosen = candidates(case)[candidate]
    x = torch.randn(case.size, generator=torch.Generator().manual_seed(0))
    benchmark.group = f"{case.layer}, {case.label}, {kind}"
    benchmark.extra_info.update(layer=case.layer, shape=case.label, sizes=case.size, candidate=candidate)
    benchmark.extra_info.update({"pass": kind, "dtype": "float32", "threads": torch.get_num_threads()})
    if kind == "forward":
        with torch.inference_mode():
            benchmark(chosen, x)
    else:
        benchmark(chosen.train(x))
