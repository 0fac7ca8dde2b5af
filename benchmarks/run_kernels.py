"""Time every operator's backends against its plain PyTorch reference, interleaved in one run.

    python benchmarks/run_kernels.py --threads 2 --output benchmarks/results/kernels.json

A shape is timed only after its output and gradients have been compared with the float64 reference. The baseline of the
backward pass is autograd through the reference. Where an operator's inputs.py knows a floor of its forward pass, work
that no implementation on the CPU can do without, that is timed in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vitzoo
from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.timing import Timing, compare
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import operators, use_backend
from vitzoo.testing import assert_backend_close

SECONDS = 1.0  # of timing for each candidate, warm-up not included


def surroundings() -> dict[str, Any]:
    """Return what a reader needs to repeat the measurement."""
    return {**machine(), "isa": native.cpu_isa(), "vnni": native.cpu_vnni()}


def with_gradients(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return fresh leaves of the floating-point tensors that require a gradient."""
    return {
        key: value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }


def forward_call(function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    """Return a call of the forward pass alone."""

    def call() -> None:
        with torch.no_grad():
            function(**inputs)

    return call


def train_call(function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    """Return a call of the forward and backward pass, all gradients."""
    leaves = with_gradients(inputs)
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]

    def call() -> None:
        out = function(**leaves)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    return call


def summary(timing: Timing) -> dict[str, float]:
    """Return median, quartiles and least time of a call in ms."""
    quartiles = {f"q{i}_ms": 1e3 * timing.percentile(25 * i) for i in (1, 3)}
    least = 1e3 * min(timing.seconds)
    rounds = len(timing.seconds)
    return {"median_ms": 1e3 * timing.median, **quartiles, "min_ms": least, "rounds": rounds}


def modules(name: str) -> tuple[ModuleType, ModuleType]:
    """Return an operator's modules of inputs and of the reference."""
    folder = getattr(vitzoo.kernels, name).__module__.rsplit(".", 1)[0]
    return importlib.import_module(f"{folder}.inputs"), importlib.import_module(f"{folder}.reference")


def shapes_and_inputs(name: str) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """Return an operator's model shapes by label, and what makes inputs of one; a folder may serve two operators."""
    module, _ = modules(name)
    shapes = getattr(module, f"{name.upper()}_MODEL_SHAPES", None) or module.MODEL_SHAPES
    return shapes, getattr(module, f"make_{name}_inputs", None) or module.make_inputs


def baselines(name: str) -> dict[str, Callable[..., Any]]:
    """Return what an operator is timed against: its reference, and the formulations that its inputs.py names."""
    module, definition = modules(name)
    named = getattr(module, f"{name.upper()}_BASELINES", None) or getattr(module, "BASELINES", {})
    return {"reference": getattr(definition, f"{name}_reference"), **named}


def forced(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return the function with its backend forced."""

    def call(**kwargs: Any) -> Any:
        with use_backend(backend):
            return function(**kwargs)

    return call


def check(name: str, backend: str, inputs: dict[str, Any], differentiable: bool) -> None:
    """Raise AssertionError unless a backend is as right as the reference; without gradients the two must agree."""
    function = getattr(vitzoo.kernels, name)
    if differentiable:
        assert_backend_close(function, inputs, backend, use_backend)
    else:
        ours, theirs = (forced(function, which)(**inputs) for which in (backend, "reference"))
        # after GELU a code may differ by one from the reference's at a tie
        bounds = {} if ours.is_floating_point() else {"rtol": 0, "atol": 1}
        torch.testing.assert_close(ours, theirs, **bounds)


def floor(name: str, shape: Any) -> Callable[[], Any] | None:
    """Return a call that does the least work of an operator's forward pass on the CPU, or None where none is known."""
    make = getattr(modules(name)[0], "floor_call", None)
    return None if make is None else make(shape)


def measure(name: str, label: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Check and time one operator at one shape with every backend that runs here, against every baseline."""
    shapes, make_inputs = shapes_and_inputs(name)
    inputs, against = make_inputs(shapes[label], dtype), baselines(name)
    adapted = getattr(modules(name)[0], "BASELINE_INPUTS", {})
    passes = {"forward": forward_call}
    if hasattr(torch.ops.vitzoo, f"{name}_bwd"):
        passes["forward+backward"] = train_call
    ours = {}
    for backend in operators[name].backends:
        if backend.name != "reference" and backend.why_not() is None:
            ours[backend.name] = forced(getattr(vitzoo.kernels, name), backend.name)
            check(name, backend.name, inputs, differentiable=len(passes) > 1)
    rows = []
    for kind, make in passes.items():
        calls = {
            k: make(f, adapted[k](inputs) if k in adapted else inputs) for k, f in (ours | against).items()
        }
        least = floor(name, shapes[label]) if kind == "forward" else None
        if least is not None and "cpu" in ours:
            calls["floor"] = least
        times = compare(calls, seconds=SECONDS, min_rounds=rounds)
        for backend, baseline in itertools.product(ours, against):
            ratio = times[backend].ratio_to(times[baseline])
            row = {"operator": name, "shape": label, "sizes": vars(shapes[label])}
            row |= {"dtype": str(dtype).removeprefix("torch."), "pass": kind, "backend": backend}
            pair = {which: summary(times[which]) for which in (backend, baseline)}
            above = ""
            if backend == "cpu" and "floor" in calls:
                row["times_floor"] = times["floor"].ratio_to(times[backend])
                pair["floor"] = summary(times["floor"])
                above = f", {row['times_floor']:.2f} times the floor"
            rows.append(row | {"baseline": baseline, "ratio": ratio, "times": pair})
            print(
                f"{name:16} {label:20} {row['dtype']:9} {kind:17} {backend:5} "
                f"{1e3 * times[backend].median:9.2f} ms, {baseline} {1e3 * times[baseline].median:9.2f} ms, "
                f"{ratio:5.1f}x{above}",
                file=sys.stderr,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operator", action="append", help="default: every operator")
    parser.add_argument(
        "--shape", action="append", help="default: every shape of the operator's MODEL_SHAPES"
    )
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.operator or sorted(operators):
        shapes, _ = shapes_and_inputs(name)
        for label in args.shape or shapes:
            for dtype in args.dtype or ["float32"]:
                rows += measure(name, label, getattr(torch, dtype), args.rounds)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": surroundings(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
