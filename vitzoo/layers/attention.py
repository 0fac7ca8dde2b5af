"""Attention layers.

Legend: B batch, C channels, H W height and width of the map, L tokens, s window size.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitzoo.kernels.pooled_attention import pooled_attention
from vitzoo.kernels.window_attention import window_attention


@register_notrace_module
class HiLo(nn.Module):
    """Attend to high and low frequencies in separate groups of heads.

    The Hi-Fi heads attend within s x s windows. The Lo-Fi heads let every position attend to the s x s
    averages of the whole map. Their results are concatenated on channels, Hi-Fi first, without a further
    projection.

    Maps that the window does not divide are zero-padded right and bottom and the result is cropped, as in the
    authors' dense-prediction code: padded positions are not masked, they take part through the bias of their
    projections and as zeros in the averages. (The authors' classification module fails on such maps, or
    floors them where alpha is 1.)

    Args:
        dim: channels C.
        num_heads: heads of both kinds together; head_dim is dim / num_heads.
        window_size: s. With 1 every head is a Lo-Fi head, which is plain attention, whatever alpha is.
        alpha: share of Lo-Fi heads, truncated to `int(num_heads * alpha)`. Parameters exist for present heads
            only.
        qkv_bias: give the query, key and value projections a bias.

    Attributes:
        l_heads, h_heads: number of Lo-Fi and Hi-Fi heads.
        l_dim, h_dim: their channels.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, `window_size` is below 1, or `alpha` outside [0,
            1].

    Source: Pan et al., Fast Vision Transformers with HiLo Attention, arXiv 2205.13213, section 3.3;
        https://github.com/ziplab/LITv2 at 7501c8662991cad6db780b61fac0886b56a76588.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size {window_size} is below 1; 1 is plain attention")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} is not a share of heads, expected 0 to 1")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.alpha = alpha
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim = self.l_heads * self.head_dim
        self.h_dim = self.h_heads * self.head_dim
        if self.l_heads:
            self.l_q = nn.Linear(dim, self.l_dim, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim, **dd)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim, **dd)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: tokens of a map in row-major order, (B, H*W, C).
            size: (H, W).

        Returns:
            (B, H*W, C), channels of the Hi-Fi heads first.

        Raises:
            ValueError: H*W is not the number of tokens.
        """
        height, width = size
        if height * width != x.shape[1]:
            raise ValueError(
                f"x has {x.shape[1]} tokens, a {height}x{width} map has {height * width}: "
                "pass the map's (H, W)"
            )
        x = x.reshape(x.shape[0], height, width, x.shape[2])
        if not self.h_heads:
            x = self._lofi(x)
        elif not self.l_heads:
            x = self._hifi(x)
        else:
            x = torch.cat((self._hifi(x), self._lofi(x)), dim=-1)
        return x.flatten(1, 2)

    def hifi(self, x: Tensor) -> Tensor:
        """Return the high-frequency branch alone.

        Args:
            x: map, (B, H, W, C).

        Returns:
            (B, H, W, h_dim): the first h_dim channels of what `forward` gives.

        Raises:
            ValueError: there are no Hi-Fi heads.
        """
        if not self.h_heads:
            raise ValueError(f"no Hi-Fi heads: alpha is {self.alpha} and window_size {self.window_size}")
        return self._hifi(x)

    def lofi(self, x: Tensor) -> Tensor:
        """Return the low-frequency branch alone.

        Args:
            x: map, (B, H, W, C).

        Returns:
            (B, H, W, l_dim): the last l_dim channels of what `forward` gives.

        Raises:
            ValueError: there are no Lo-Fi heads.
        """
        if not self.l_heads:
            raise ValueError(f"no Lo-Fi heads: alpha {self.alpha} of {self.num_heads} heads truncates to 0")
        return self._lofi(x)

    def _hifi(self, x: Tensor) -> Tensor:
        # what the projection makes of a padded position, which is zero, is its bias
        qkv, pad = self.h_qkv(x), self.h_qkv.bias
        return self.h_proj(
            window_attention(qkv, self.h_heads, self.window_size, scale=self.scale, pad_qkv=pad)
        )

    def _lofi(self, x: Tensor) -> Tensor:
        q = self.l_q(x)
        if self.window_size > 1:
            x = self._pooled(x)
        return self.l_proj(pooled_attention(q, self.l_kv(x), self.l_heads, scale=self.scale))

    def _pooled(self, x: Tensor) -> Tensor:
        below, right = -x.shape[1] % self.window_size, -x.shape[2] % self.window_size
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        # the permuted view is a channels-last map, which the pooling takes as it is
        return F.avg_pool2d(x.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Say how the heads are shared out."""
        return f"h_heads={self.h_heads}, l_heads={self.l_heads}, window_size={self.window_size}"


class PlainAttention(TorchFunctionMode):
    """Spells scaled_dot_product_attention out as matmuls and a softmax.

    The exporter knows the fused call for 4-D tensors only; timm's windowed attention has five axes. Inputs
    may have any number of leading axes: q (..., L, head_dim), k and v (..., S, head_dim).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not kwargs.get("enable_gqa"):
            return _plain_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention as the documentation of torch's fused call defines it, without dropout."""
    attn = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(attn.shape[-2:], dtype=torch.bool, device=attn.device).tril()
    if attn_mask is not None:
        attn = attn.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn + attn_mask
    return attn.softmax(-1) @ value
