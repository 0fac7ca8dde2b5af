"""When a call goes past the dispatcher, and that nothing which listens there misses it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitzoo.kernels.common.eager import direct

X = torch.tensor([1.0, 2.0])


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def _way(*args: Any) -> str:
    """Return which of the two an operator's call takes."""
    ways: list[str] = []
    direct(lambda *args: ways.append("dispatcher"), lambda *args: ways.append("direct"))(*args)
    return ways[0]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_plain_tensors_without_gradient_go_directly(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        made_here = X * 2
        assert _way(X, 3, None, made_here) == "direct"
    assert _way(made_here) == "direct"


def test_parameters_go_directly_only_where_no_gradient_is_wanted() -> None:
    weight = torch.nn.Parameter(X)
    assert _way(X, weight) == "dispatcher"
    with torch.no_grad():
        assert _way(X, weight) == "direct"


@pytest.mark.parametrize(
    "mode",
    [
        _FunctionMode,
        _DispatchMode,
        lambda: torch.autocast("cpu"),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        forward_ad.dual_level,
    ],
    ids=["function_mode", "dispatch_mode", "autocast", "profiler", "forward_mode"],
)
def test_what_listens_in_the_dispatcher_hears_the_call(
    mode: Callable[[], AbstractContextManager[Any]],
) -> None:
    with mode():
        assert _way(X) == "dispatcher"
    assert _way(X) == "direct"


@pytest.mark.parametrize(
    "x",
    [
        X.as_subclass(_Subclass),
        torch.tensor([1j]).conj().imag,
        X.to("meta"),
        X.to_sparse(),
    ],
    ids=["subclass", "negated", "meta", "sparse"],
)
def test_other_tensors_go_through_the_dispatcher(x: Tensor) -> None:
    assert _way(X, x) == "dispatcher"


def test_transforms_go_through_the_dispatcher() -> None:
    ways: list[str] = []

    def call(x: Tensor) -> Tensor:
        ways.append(_way(x))
        return x * 2

    torch.vmap(call)(X)
    assert ways == ["dispatcher"]
