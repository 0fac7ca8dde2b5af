"""Bidirectional selective scan on the CPU in C++: routes 0 and 2 of the routed scan, in one pass over memory.

B and C that are constant, or in different numbers of groups, are for two calls of the one-directional kernel instead:
no model has them, and the routed kernel does not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.kernels.bidirectional_selective_scan import routes
from vitzoo.kernels.bidirectional_selective_scan.reference import two_scans
from vitzoo.kernels.common import routed_scan
from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.common.registration import backward_by_autograd


def why_not(u: Tensor | None = None, *args: Any) -> str | None:
    """Return why the C++ kernels cannot take a call, or None."""
    return routed_scan.why_not(u)


def _is_routed(B: Tensor, C: Tensor) -> bool:
    groups = [matrix.shape[1] if matrix.ndim == 4 else 1 for matrix in (B, C)]
    return min(B.ndim, C.ndim) > 2 and groups[0] == groups[1]


def forward(*inputs: Any) -> Tensor:
    """Return out; inputs as in the operator's schema."""
    if _is_routed(inputs[4], inputs[5]):
        return routed_scan.forward(*routes.arguments(*inputs))
    with use_backend("cpu"):
        return two_scans(*inputs)


def backward(dout: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensor inputs, in order; None for absent ones."""
    if _is_routed(inputs[4], inputs[5]):
        return routes.gradients(routed_scan.backward(dout, *routes.arguments(*inputs)))
    with use_backend("cpu"):
        return backward_by_autograd(two_scans, inputs, (dout,), tuple(range(15)))
