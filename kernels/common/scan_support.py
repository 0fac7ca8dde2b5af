"""What the CPU C++ scans share: which tensors they take, and how channels are divided into work items."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.kernels.common import native

# Channels that one work item of the forward pass takes: a multiple of every vector width.
TILE = 16
# Work items that the backward pass aims at. Each has its own sums of dB and dC over its channels, added up in a fixed
# order afterwards: the result does not depend on the number of threads.
BACKWARD_ITEMS = 64
# Tokens of a piece of a scan that is divided along them, kBackwardTokens in C++; the forward pass takes multiples, so
# that there are no more than MOST_PIECES. Fewer work items than FEW_ITEMS leave cores idle, and LONG tokens are enough
# to share. All look at the shape alone, and the pieces do: the result does not depend on the number of threads.
PIECE = 256
MOST_PIECES = 64
FEW_ITEMS = 8
LONG = 1024


def why_not(u: Tensor | None, *names: str) -> str | None:
    """Return why the C++ kernels, which call the extension's operators `names`, cannot take a call on `u`, or None."""
    return native.cpu_why_not("u", u, *names)


def compute_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of state and sums: float64 for float64 inputs, float32 for narrower ones."""
    return torch.promote_types(u.dtype, torch.float32)


def as_wide_as(u: Tensor, x: Tensor) -> Tensor:
    """Return x, in float64 exactly when u is: the kernels read any narrower mix as it is."""
    mixed = (x.dtype == torch.float64) != (u.dtype == torch.float64)
    return x.to(compute_dtype(u)) if mixed else x


def part_channels(batch: int, groups: int, channels: int, dstate: int) -> int:
    """Return the channels of one work item of the backward pass, a multiple of `TILE`.

    Its sums of dB and dC, over all items, stay at or below u in number; a group is at least one item.

    Args:
        batch: B.
        groups: of channels that share B and C.
        channels: D / groups.
        dstate: N.
    """
    tiles = -(-channels // TILE)
    parts = min(tiles, max(1, -(-BACKWARD_ITEMS // (batch * groups))), max(1, channels // (2 * dstate)))
    return -(-tiles // parts) * TILE


def is_divided(items: int, seqlen: int) -> bool:
    """Return whether a scan of that many work items is divided along its tokens.

    Args:
        items: pieces of channels, over all images, that are scanned independently of each other.
        seqlen: L.
    """
    return 0 < items < FEW_ITEMS and seqlen >= LONG


def forward_division(batch: int, groups: int, dim: int, seqlen: int) -> tuple[int, int]:
    """Return the channels of one work item of the forward pass, and the tokens of a piece, 0 where it is not divided.

    Args:
        batch: B.
        groups: of channels that share B and C.
        dim: D.
        seqlen: L.
    """
    if not is_divided(batch * groups * -(-dim // (groups * TILE)), seqlen):
        return TILE, 0
    # every channel by itself has the same bits, so here the division may look at the machine
    return TILE if native.cpu_isa() == "avx512" else TILE // 2, PIECE * -(-seqlen // (PIECE * MOST_PIECES))
