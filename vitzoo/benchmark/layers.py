"""Attention layers as models of their own, for claims about a layer: `layer:hilo`, `layer:spatial_reduction`, ...

Each takes a map (B, C, H, W), as a stage of a backbone does, and attends over its positions. The default is the
place of LITv2-S's third stage, 14 x 14 positions of 384 channels and 12 heads, which the HiLo paper compares.

Legend: B batch, C channels, H W height and width, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Attention
from timm.models.pvt_v2 import Attention as SpatialReduction
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from vitzoo.layers import HiLo

SIDE = 14


class AttentionLayer(nn.Module):
    """One attention layer, a map in and a map of tokens out.

    Args:
        kind: one of `LAYERS`.
        dim: channels C.
        num_heads: heads.
        window_size: of "hilo" the window and the pooling, of "local_window" the window.
        sr_ratio: of "spatial_reduction" the stride of keys and values.
        alpha: of "hilo" the share of Lo-Fi heads.
    """

    def __init__(
        self,
        kind: str,
        dim: int = 384,
        num_heads: int = 12,
        window_size: int | None = None,
        sr_ratio: int = 2,
        alpha: float = 0.9,
    ) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim
        self.window_size = window_size or (2 if kind == "hilo" else 7)
        self.attention: Any = {
            "hilo": lambda: HiLo(dim, num_heads, self.window_size, alpha),
            "spatial_reduction": lambda: SpatialReduction(dim, num_heads, sr_ratio),
            "local_window": lambda: WindowAttention(dim, num_heads, window_size=self.window_size),
            "global": lambda: Attention(dim, num_heads),
        }[kind]()
        self.pretrained_cfg = {"input_size": (dim, SIDE, SIDE)}

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, C, H, W) -> (B, L, C)."""
        size = (x.shape[2], x.shape[3])
        if self.kind == "local_window":
            window = (self.window_size, self.window_size)
            windows = window_partition(x.permute(0, 2, 3, 1), window).flatten(1, 2)
            out = self.attention(windows).unflatten(1, window)
            return window_reverse(out, window, *size).flatten(1, 2)
        tokens = x.flatten(2).transpose(1, 2)  # (B, L, C)
        return self.attention(tokens) if self.kind == "global" else self.attention(tokens, size)


LAYERS = ("hilo", "spatial_reduction", "local_window", "global")


def create_layer(name: str, **kwargs: Any) -> nn.Module:
    """Create a layer by its name in `LAYERS`."""
    make: Callable[..., nn.Module] = AttentionLayer
    return make(name, **kwargs)
