"""Calls an operator directly where nothing in PyTorch's dispatcher would act on the call.

The way through the dispatcher into a Python function and back costs some tens of microseconds, more than many a kernel
takes on a batch of one. A call on plain CPU tensors that wants no gradient, outside autocast and every mode, gets from
it only the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import profiler as autograd_profiler


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# A tensor with any other key is fake, wrapped by a transform, negated on reading, sparse, on a GPU, ...
_INFERENCE = _keys("CPU", "AutocastCPU")  # made under inference_mode
_PLAIN = _keys("CPU", "AutocastCPU", "ADInplaceOrView", "AutogradCPU")
# What every thread includes, within inference_mode and outside; modes, tracing and transforms include more.
_OUTSIDE_MODES = (_keys("BackendSelect"), _keys("BackendSelect", "ADInplaceOrView"))


def _nothing_listens() -> bool:
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _OUTSIDE_MODES
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not autograd_profiler._is_profiler_enabled
        and forward_ad._current_level < 0
    )


def _plain(x: Tensor, grad: bool) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._dispatch_keys(x).raw_repr() in (_PLAIN, _INFERENCE)
        and not (grad and x.requires_grad)
    )


def direct(packet: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls `packet`, an operator, or straight away `run`, its implementation, with the same result.

    Args:
        packet: from torch.ops, called with positional arguments.
        run: what the dispatcher would call below autograd and autocast.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _nothing_listens():
            return packet(*args)
        grad = torch.is_grad_enabled()
        for value in args:
            if isinstance(value, Tensor) and not _plain(value, grad):
                return packet(*args)
        return run(*args)

    return call
