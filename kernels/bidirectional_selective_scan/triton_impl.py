"""Bidirectional selective scan in Triton: the two routes over rows of the kernels in `common/scan_kernels.py`.

Both directions of a chunk are one program, which reads u, u_b, z and both steps once and writes their gated sum once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.bidirectional_selective_scan import routes
from vitzoo.kernels.common import scan_triton


def forward(*inputs: Any) -> Tensor:
    """Return out; inputs as in the operator's schema."""
    return scan_triton.forward(*routes.arguments(*inputs))[0]


def backward(dout: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensor inputs, in order; None for absent ones."""
    return routes.gradients(scan_triton.backward(dout, None, *routes.arguments(*inputs)))


def __getattr__(name: str) -> Any:
    """Make AHEAD, what to compile ahead of time, when it is asked for."""
    if name != "AHEAD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitzoo.kernels.bidirectional_selective_scan.inputs import Shape, make_inputs

    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (Shape(2, 64, 197, 16), Shape(2, 64, 300, 16, has_u_b=False, has_z=False)):
            tensors = make_inputs(shape, dtype).values()
            inputs = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in tensors)
            found += _launches(inputs)
    return tuple(found)


def _launches(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return scan_triton.launches(lambda: (forward(*inputs), backward(inputs[0], *inputs)))
