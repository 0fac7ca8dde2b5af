"""Cross-scan and cross-merge in plain PyTorch: the definition (VMamba, arXiv 2401.10166, section 4.2).

The four routes over a map, in order: row by row, column by column, and both from the last pixel to the first.
Legend: B batch, C channels, H W height and width, L = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_scan_reference(x: Tensor) -> Tensor:
    """Return the four sequences (B, 4, C, L) of a map (B, C, H, W)."""
    ahead = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), dim=1)
    return torch.cat((ahead, ahead.flip(-1)), dim=1)


def cross_merge_reference(y: Tensor, H: int, W: int) -> Tensor:
    """Return the map (B, C, H, W) in which every pixel is the sum of its four places in y (B, 4, C, L).

    Inputs of 16 bits are summed in float32.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    both = wide[:, :2] + wide[:, 2:].flip(-1)
    rows, columns = both.unbind(1)
    return (rows.unflatten(2, (H, W)) + columns.unflatten(2, (W, H)).transpose(2, 3)).to(y.dtype)
