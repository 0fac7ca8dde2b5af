"""Four-direction selective scan on the CPU in C++: the four routes of the routed scan, in one pass over memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.common import routed_scan
from vitzoo.kernels.cross_selective_scan import routes


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return routed_scan.why_not(x)


def forward(x: Tensor, *inputs: Any) -> Tensor:
    """Return out; inputs as in the operator's schema."""
    return routed_scan.forward(*routes.arguments(x, *inputs)).unflatten(2, x.shape[2:])


def backward(dout: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensor inputs, in order; None for absent ones."""
    found = routed_scan.backward(dout.flatten(2), *routes.arguments(x, *inputs))
    return routes.gradients(found, x)
