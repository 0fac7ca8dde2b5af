"""Four-direction selective scan in Triton: two launches of the kernels in `common/scan_kernels.py`.

The two directions over rows of a chunk are one program, then those over columns, whose programs add to the first sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common import scan_triton
from vitzoo.kernels.cross_selective_scan import routes


def forward(x: Tensor, *inputs: Any) -> Tensor:
    """Return out; inputs as in the operator's schema."""
    return scan_triton.forward(*routes.arguments(x, *inputs))[0].unflatten(2, x.shape[2:])


def backward(dout: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensor inputs, in order; None for absent ones."""
    found = scan_triton.backward(dout.flatten(2), None, *routes.arguments(x, *inputs))
    return routes.gradients(found, x)


def __getattr__(name: str) -> Any:
    """Make AHEAD, what to compile ahead of time, when it is asked for."""
    if name != "AHEAD":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitzoo.kernels.cross_selective_scan.inputs import Shape, make_inputs

    found: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (Shape(2, 64, 14, 14, 1), Shape(2, 64, 20, 18, 16, has_D=False, has_delta_bias=False)):
            tensors = make_inputs(shape, dtype).values()
            inputs = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in tensors)
            found += _launches(inputs)
    return tuple(found)


def _launches(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return scan_triton.launches(lambda: (forward(*inputs), backward(inputs[0], *inputs)))
