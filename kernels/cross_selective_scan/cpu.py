"""Four-direction selective scan on the CPU in C++: the four routes of the routed scan, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import routed_scan
from vitzoo.kernels.common.scan_support import as_wide_as
from vitzoo.kernels.cross_selective_scan import routes


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return routed_scan.why_not(x)


def forward(x: Tensor, *inputs: Any) -> Tensor:
    """Return out; inputs as in the operator's schema."""
    return routed_scan.forward(*routes.arguments(x, *inputs)).unflatten(2, x.shape[2:])


def backward(dout: Tensor, x: Tensor, delta: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensor inputs, in order; None for absent ones."""
    # the largest of the gradients is written in place, not put together from four
    ddelta = torch.empty(delta.shape, dtype=as_wide_as(x, delta).dtype)
    views = ddelta.flatten(3).unbind(1)
    found = routed_scan.backward(dout.flatten(2), *routes.arguments(x, delta, *inputs), ddelta=views)
    return routes.gradients(found, x, ddelta)
