"""Operators as cases to be timed: shapes, backends and baselines, from each operator's own folder.

run_kernels.py times the candidates of a case side by side for ratios, test_operators.py each by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import vitzoo
from vitzoo.kernels.common.backends import operators, use_backend
from vitzoo.testing import assert_backend_close


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


def passes(name: str) -> dict[str, Callable[..., Callable[[], Any]]]:
    """Return what makes a call of the forward pass and, where there are gradients, of forward and backward pass."""
    both = {"forward": forward_call, "forward+backward": train_call}
    return both if hasattr(torch.ops.vitzoo, f"{name}_bwd") else {"forward": forward_call}


def backends(name: str) -> list[str]:
    """Return an operator's backends that run here on CPU tensors, the reference left out."""
    # Triton's interpreter and the host form of CUDA kernels are for tests; elsewhere both want tensors on a GPU
    return [b.name for b in operators[name].backends if b.name == "cpu" and b.why_not() is None]


def smallest(name: str) -> str:
    """Return the label of the model shape whose tensors are smallest."""
    shapes, make_inputs = shapes_and_inputs(name)

    def elements(label: str) -> int:
        return sum(x.numel() for x in make_inputs(shapes[label]).values() if isinstance(x, Tensor))

    with FakeTensorMode():  # sizes without numbers
        return min(shapes, key=elements)


def candidates(name: str, kind: str, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return calls of every backend that runs here and of every baseline, for one pass of `passes`."""
    make, adapted = passes(name)[kind], getattr(modules(name)[0], "BASELINE_INPUTS", {})
    ours = {backend: forced(getattr(vitzoo.kernels, name), backend) for backend in backends(name)}
    return {
        k: make(f, adapted[k](inputs) if k in adapted else inputs)
        for k, f in (ours | baselines(name)).items()
    }
