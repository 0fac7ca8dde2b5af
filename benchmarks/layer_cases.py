"""Layers as cases to be timed, at the sizes of the models that they come from, beside what they are compared with.

run_layers.py times HiLo and its rivals side by side for ratios, test_layers.py every candidate by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitzoo.layers import DeformConv2d, HiLo, polyphase_anchor
from vitzoo.layers.norm import RMSNorm
from vitzoo.layers.polyphase import circular_pad_tokens, polyphase_anchor_tokens
from vitzoo.layers.ssm import BidirectionalMamba
from vitzoo.layers.token import ScoredAttention, class_attention, prune_tokens, scatter_tokens

DIM, HEADS = 384, 12  # of LITv2-S's stage 3
HILO_SIZES = ((14, 1), (14, 8), (56, 1))  # side of the map, batch


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Attributes:
        call: takes the input.
        module: whose parameters get gradients too.
    """

    call: Callable[[Tensor], Any]
    module: nn.Module | None = None

    def __call__(self, x: Tensor) -> Any:
        """Call it."""
        return self.call(x)

    def train(self, x: Tensor) -> Callable[[], Any]:
        """Return a call of the forward and backward pass, gradients of the input and of every parameter."""
        leaf = x.detach().clone().requires_grad_()
        wanted = [leaf, *(self.module.parameters() if self.module is not None else ())]

        def call() -> None:
            out = self.call(leaf)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

        return call


@dataclass(frozen=True)
class Case:
    """One layer at one size.

    Attributes:
        layer: class or function of `vitzoo.layers`.
        label: where the size comes from.
        size: of the input.
        make: returns the layer, by its name in lower case, and what it is compared with.
    """

    layer: str
    label: str
    size: tuple[int, ...]
    make: Callable[[], dict[str, Candidate]]


class PlainHiLo(nn.Module):
    """HiLo in torch operations as the paper's module is written: windows by copies, attention by the matrix.

    Source: Pan et al., arXiv 2205.13213, section 3.3; the order of operations is that of
        https://github.com/ziplab/LITv2 at 7501c8662991cad6db780b61fac0886b56a76588, hilo.py.
    """

    def __init__(self, layer: HiLo) -> None:
        super().__init__()
        self.layer = layer
        self.pool = nn.AvgPool2d(layer.window_size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * self.layer.scale).softmax(dim=-1) @ v

    def _hifi(self, x: Tensor) -> Tensor:
        layer, (batch, height, width, channels) = self.layer, x.shape
        s, heads = layer.window_size, layer.h_heads
        rows, cols = height // s, width // s
        x = x.reshape(batch, rows, s, cols, s, channels).transpose(2, 3)
        qkv = (
            layer.h_qkv(x).reshape(batch, rows * cols, -1, 3, heads, layer.head_dim).permute(3, 0, 1, 4, 2, 5)
        )
        x = self._attend(*qkv.unbind(0)).transpose(2, 3).reshape(batch, rows, cols, s, s, layer.h_dim)
        return layer.h_proj(x.transpose(2, 3).reshape(batch, height, width, layer.h_dim))

    def _lofi(self, x: Tensor) -> Tensor:
        layer, (batch, height, width, channels) = self.layer, x.shape
        q = layer.l_q(x).reshape(batch, height * width, layer.l_heads, layer.head_dim).permute(0, 2, 1, 3)
        pooled = self.pool(x.permute(0, 3, 1, 2)).reshape(batch, channels, -1).permute(0, 2, 1)
        kv = layer.l_kv(pooled).reshape(batch, -1, 2, layer.l_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
        x = self._attend(q, *kv.unbind(0)).transpose(1, 2).reshape(batch, height, width, layer.l_dim)
        return layer.l_proj(x)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, H*W, C) to the same shape."""
        x = x.unflatten(1, size)
        return torch.cat((self._hifi(x), self._lofi(x)), dim=-1).flatten(1, 2)


def hilo(side: int) -> dict[str, Candidate]:
    """Return HiLo and layers of equal width and heads on a map of that side, (B, side*side, C), ours first."""
    torch.manual_seed(0)
    size = (side, side)
    ours = HiLo(DIM, HEADS, window_size=2, alpha=0.9, qkv_bias=True).eval()
    plain = PlainHiLo(ours)
    reduced = SpatialReductionAttention(DIM, HEADS, sr_ratio=2).eval()
    found = {
        "hilo": Candidate(lambda x: ours(x, size), ours),
        "authors": Candidate(lambda x: plain(x, size), plain),
        "pvt": Candidate(lambda x: reduced(x, size), reduced),
    }
    for shift in (0, 3):
        block = SwinTransformerBlock(DIM, size, num_heads=HEADS, window_size=7, shift_size=shift).eval()
        name = f"swin{' shifted' if shift else ''}"
        found[name] = Candidate(functools.partial(_swin_attention, block, size), block.attn)
    return found


def _swin_attention(block: SwinTransformerBlock, size: tuple[int, int], x: Tensor) -> Tensor:
    return block._attn(x.unflatten(1, size)).flatten(1, 2)


def deform_conv2d(in_chans: int, out_chans: int) -> dict[str, Candidate]:
    """Return the deformable convolution and an ordinary one of its kernel and stride."""
    ours, plain = DeformConv2d(in_chans, out_chans, 2), nn.Conv2d(in_chans, out_chans, 2, 2)
    return {"deformconv2d": Candidate(ours, ours), "conv2d": Candidate(plain, plain)}


def mamba(dim: int) -> dict[str, Candidate]:
    """Return Vim's mixer and timm's attention of the width and heads of the DeiT it is compared with."""
    ours, plain = BidirectionalMamba(dim), Attention(dim, dim // 64, qkv_bias=True)
    return {"bidirectionalmamba": Candidate(ours, ours), "attention": Candidate(plain, plain)}


def scored_attention(dim: int) -> dict[str, Candidate]:
    """Return EViT's attention with scores and timm's without."""
    ours, plain = ScoredAttention(dim, dim // 64, qkv_bias=True), Attention(dim, dim // 64, qkv_bias=True)
    scored = Candidate(lambda x: ours(x, return_scores=True), ours)
    return {"scoredattention": scored, "attention": Candidate(plain, plain)}


def rms_norm(dim: int) -> dict[str, Candidate]:
    """Return our RMS norm, PyTorch's and PyTorch's LayerNorm."""
    norms = {
        "rmsnorm": RMSNorm(dim, eps=1e-5),
        "nn.RMSNorm": nn.RMSNorm(dim),
        "nn.LayerNorm": nn.LayerNorm(dim),
    }
    return {name: Candidate(norm, norm) for name, norm in norms.items()}


def pruned_tokens(rate: float, fuse: bool) -> dict[str, Candidate]:
    """Return EViT's reorganization; the scores are the first channel."""
    return {"prune_tokens": Candidate(lambda x: prune_tokens(x, x[:, 1:, 0].detach(), rate, None, fuse))}


def scattered_tokens(num_patches: int, batch: int, count: int) -> dict[str, Candidate]:
    """Return the way back from kept tokens to the grid."""
    patches = torch.stack([torch.randperm(num_patches)[:count] for _ in range(batch)])
    return {"scatter_tokens": Candidate(lambda x: scatter_tokens(x, patches, num_patches))}


def function(name: str, call: Callable[[Tensor], Any]) -> dict[str, Candidate]:
    """Return a function without rivals."""
    return {name: Candidate(call)}


def cases() -> Iterator[Case]:
    """Return every layer at every size, the first size of a layer being the one for a quick run."""
    some = functools.partial
    for side, batch in HILO_SIZES:
        yield Case("HiLo", f"litv2_small_{side}x{side}_batch{batch}", (batch, side**2, DIM), some(hilo, side))
    for stage, side, chans in ((3, 28, 192), (2, 56, 96), (4, 14, 384)):
        size, make = (4, chans, side, side), some(deform_conv2d, chans, 2 * chans)
        yield Case("DeformConv2d", f"litv2_small_stage{stage}", size, make)
    for name, dim in (("tiny", 192), ("small", 384), ("base", 768)):
        yield Case("BidirectionalMamba", f"vim_{name}", (4, 197, dim), some(mamba, dim))
        yield Case("RMSNorm", f"vim_{name}", (4, 197, dim), some(rms_norm, dim))
    for name, dim in (("small", 384), ("tiny", 192), ("base", 768)):
        yield Case("ScoredAttention", f"evit_{name}", (8, 197, dim), some(scored_attention, dim))
        attend = some(function, "class_attention", lambda q: class_attention(q, q))
        yield Case("class_attention", f"evit_{name}", (8, dim // 64, 197, 64), attend)
        for fuse in (True, False):
            label = f"evit_{name}{'_fused' if fuse else ''}"
            yield Case("prune_tokens", label, (8, 197, dim), some(pruned_tokens, 0.7, fuse))
        yield Case("scatter_tokens", f"evit_{name}", (8, 68, dim), some(scattered_tokens, 196, 8, 68))
    for stage, side, dim in ((1, 56, 64), (3, 14, 256)):
        label, size = f"twins_svt_small_stage{stage}", (side, side)
        tokens = some(polyphase_anchor_tokens, size=size, phase=(7, 7))
        pad = some(circular_pad_tokens, size=size)
        for name, call in (("polyphase_anchor_tokens", tokens), ("circular_pad_tokens", pad)):
            yield Case(name, label, (4, side**2, dim), some(function, name, call))
    for name, phase in (("twins_svt_small", 4), ("vit_small", 16)):
        anchor = some(polyphase_anchor, phase=(phase, phase))
        yield Case("polyphase_anchor", name, (4, 3, 224, 224), some(function, "polyphase_anchor", anchor))
