"""Four-direction selective scan by cross-scan, selective scan and cross-merge: the definition.

VMamba, arXiv 2401.10166, section 4.2 (SS2D).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vitzoo.kernels.common.backends import use_backend
from vitzoo.kernels.cross_scan import cross_merge, cross_scan
from vitzoo.kernels.selective_scan import selective_scan


def along_routes(maps: Tensor) -> Tensor:
    """Return (B, 4, C, L), maps[:, k] (B, C, H, W) read along route k."""
    rows, columns, rows_back, columns_back = maps.unbind(1)
    ahead = torch.stack((rows.flatten(2), columns.transpose(2, 3).flatten(2)), dim=1)
    back = torch.stack((rows_back.flatten(2), columns_back.transpose(2, 3).flatten(2)), dim=1)
    return torch.cat((ahead, back.flip(-1)), dim=1)


def composed(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run the three operators one after the other, the scan over 4 D channels in 4 groups."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = selective_scan(
        cross_scan(wide).flatten(1, 2),
        along_routes(delta).flatten(1, 2),
        A.flatten(0, 1),
        along_routes(B),
        along_routes(C),
        None if D is None else D.flatten(),
        None,
        None if delta_bias is None else delta_bias.flatten(),
        delta_softplus,
    )
    routes = cast(Tensor, y).unflatten(1, (4, x.shape[1]))
    return cross_merge(routes, x.shape[2], x.shape[3]).to(x.dtype)


def cross_selective_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Return the map (B, D, H, W); see `vitzoo.kernels.cross_selective_scan` for shapes."""
    with use_backend("reference"):
        return composed(x, delta, A, B, C, D, delta_bias, delta_softplus)
