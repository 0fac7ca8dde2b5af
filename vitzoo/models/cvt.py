"""CvT, Convolutional vision Transformer.

Paper: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021, arXiv 2103.15808.
Code: https://github.com/leoxiaobin/CvT at 46ab3c832650a655becf60dd2fc5b8628ee5fbc8 (MIT),
lib/models/cls_cvt.py.

Where paper and code differ the code is followed: attention is scaled by C ** -0.5 with C the full width (the
paper and other ports say the head width), the MLP uses x * sigmoid(1.702 x), and only the class token meets
the final norm. `forward_features` gives tokens, the class token first, since the classifier reads that token
alone: timm's tests count CvT among the token models. Maps are channels-last in memory between convolutions
and linear layers, so neither side copies.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    QuickGELU,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.models._base import Backbone
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family

_MIN_SIZE = 3  # the first convolution, 7x7 with padding 2, needs as much


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, eps 1e-5, computed in float32 under half precision too."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C)."""
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def _map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """View tokens (B, H*W, C) as a map (B, C, H, W), channels last in memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    """View a channels-last map (B, C, H, W) as tokens (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


class ConvEmbed(nn.Module):
    """Convolutional token embedding: a strided convolution with overlap, then LayerNorm.

    Source: paper section 3.2.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, kernel_size: int, stride: int, padding: int, **dd: Any
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding, **dd)
        self.norm = LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed a map (B, C_in, H, W) as tokens (B, H'*W', C), and give (H', W')."""
        x = self.proj(x)
        size = (x.shape[2], x.shape[3])
        return self.norm(_tokens(x)), size


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution and BatchNorm, before the linear projection of q, k or v.

    Source: paper section 3.3.
    """

    def __init__(self, dim: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, H'*W', C) of a channels-last map (B, C, H, W)."""
        # The convolution keeps the layout where a channels-last kernel exists. Elsewhere the copy is made
        # here: the gradient arrives channels last, and torch's CPU BatchNorm backward is wrong for one NCHW
        # image then.
        return _tokens(self.bn(self.conv(x).contiguous(memory_format=torch.channels_last)))


class Attention(nn.Module):
    """Attention over convolved tokens, keys and values at half the resolution.

    Source: paper section 3.3; scale C ** -0.5 of the full width as in the code.
    """

    def __init__(
        self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = dim**-0.5
        self.fused_attn = use_fused_attn()
        self.conv_proj_q = ConvProjection(dim, 1, **dd)
        self.conv_proj_k = ConvProjection(dim, 2, **dd)
        self.conv_proj_v = ConvProjection(dim, 2, **dd)
        self.proj_q = nn.Linear(dim, dim, **dd)
        self.proj_k = nn.Linear(dim, dim, **dd)
        self.proj_v = nn.Linear(dim, dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, head_dim)

    def forward(self, x: Tensor, size: tuple[int, int], prefix: int) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, prefix + H*W, C).
            size: (H, W).
            prefix: number of class tokens in front, 0 or 1.

        Returns:
            As x.
        """
        maps = _map(x[:, prefix:] if prefix else x, size)
        q, k, v = self.conv_proj_q(maps), self.conv_proj_k(maps), self.conv_proj_v(maps)
        if prefix:
            first = x[:, :prefix]
            q, k, v = (torch.cat((first, t), dim=1) for t in (q, k, v))
        q, k, v = self._heads(self.proj_q(q)), self._heads(self.proj_k(k)), self._heads(self.proj_v(v))
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Transformer block with convolutional projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = Attention(dim, num_heads, attn_drop, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=QuickGELU, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int], prefix: int) -> Tensor:
        """Advance tokens (B, prefix + H*W, C) by attention and MLP."""
        x = x + self.drop_path1(self.attn(self.norm1(x), size, prefix))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Convolutional embedding and blocks of one resolution; the last stage has a class token."""

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        embed: tuple[int, int, int],
        num_heads: int,
        drop_path: list[float],
        class_token: bool,
        pos_drop: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.patch_embed = ConvEmbed(in_chans, embed_dim, *embed, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, drop_path=rate, **kwargs) for rate in drop_path]
        )


class CvT(Backbone):
    """CvT: three stages of convolutional embedding and attention, no position table.

    Any input size of at least 3x3 pixels works, square or not.

    Args:
        img_size: nominal input size; changes nothing but is checked and remembered.
        in_chans, num_classes: channels of the input; classes, 0 for none.
        global_pool: "token" (the class token, as published), "avg" (mean of the other tokens) or "".
        embed_dims, depths, num_heads: width, blocks and heads of each stage.
        embed_kernels, embed_strides, embed_paddings: convolution of each stage's embedding.
        mlp_ratio: hidden width of the MLPs over the block's.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout of the classifier's input, of the
            embeddings, of projections and MLPs, of attention weights.
        drop_path_rate: stochastic depth, linear over the blocks of the last stage, none before (training used
            0.1, for cvt_w24_384 0.3).
        device, dtype: of the parameters.

    Raises:
        ValueError: a size, a pooling or a width that the design does not allow.
    """

    pools = ("", "token", "avg")
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: tuple[int, ...] = (1, 3, 6),
        embed_kernels: tuple[int, ...] = (7, 3, 3),
        embed_strides: tuple[int, ...] = (4, 2, 2),
        embed_paddings: tuple[int, ...] = (2, 1, 1),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if img_size is not None:
            self._resize(to_2tuple(img_size))
        self.num_classes, self.in_chans = num_classes, in_chans
        self.global_pool = self._checked_pool(global_pool)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = []
        last, reduction = len(depths) - 1, 1
        for i, dim in enumerate(embed_dims):
            rates = calculate_drop_path_rates(drop_path_rate, depths[i]) if i == last else [0.0] * depths[i]
            stage = Stage(
                embed_dims[i - 1] if i else in_chans,
                dim,
                (embed_kernels[i], embed_strides[i], embed_paddings[i]),
                num_heads[i],
                rates,
                class_token=i == last,
                pos_drop=pos_drop_rate,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                **dd,
            )
            self.add_module(f"stage{i}", stage)  # the names of the published weights
            reduction *= embed_strides[i]
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stage{i}"))
        self.norm = LayerNorm(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(**dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise: linear weights and class token truncated normal 0.02, biases 0, the rest as torch does.

        Args:
            needs_reset: reset convolutions and norms too, for a model whose memory was never filled
                (`to_empty`).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif needs_reset and isinstance(module, nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, Stage) and module.cls_token is not None:
                trunc_normal_(module.cls_token, std=0.02)

    def _stem(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return x, (0, 0)

    def _step(self, index: int, state: tuple[Tensor, tuple[int, int]]) -> tuple[Tensor, tuple[int, int]]:
        x, size = state
        stage = cast(Stage, self.get_submodule(f"stage{index}"))
        x, size = stage.patch_embed(_map(x, size) if index else x)
        prefix = 0
        if stage.cls_token is not None:
            x, prefix = torch.cat((stage.cls_token.expand(x.shape[0], -1, -1), x), dim=1), 1
        x = stage.pos_drop(x)
        for block in stage.blocks:
            x = self._checkpointed(block, x, size, prefix)
        return x, size

    def _tap(self, index: int, state: tuple[Tensor, tuple[int, int]], norm: bool) -> Tensor:
        x, size = state
        if self.get_submodule(f"stage{index}").cls_token is not None:
            x = self.norm(x) if norm else x  # the only norm that the classifier sees is of this width
            x = x[:, 1:]
        return _map(x, size).contiguous()

    def _final(self, state: tuple[Tensor, tuple[int, int]]) -> Tensor:
        return self.norm(state[0])

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool == "token" and self.num_prefix_tokens == 0:
            raise ValueError(
                "global_pool 'token' needs the class token, which went with the last stage; use 'avg'"
            )
        return super()._checked_pool(global_pool)

    def _truncate(self, count: int) -> None:
        for index in range(count, self.num_taps):
            self.add_module(f"stage{index}", nn.Identity())
        self.num_prefix_tokens = 0

    def _resize(self, img_size: tuple[int, int]) -> None:
        if min(img_size) < _MIN_SIZE:
            raise ValueError(
                f"img_size {img_size[0]}x{img_size[1]} is too small, {_MIN_SIZE} pixels a side is the least"
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that take no weight decay besides norms and biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        last = self.num_taps - 1
        fine = [
            (r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)),
            (r"^stage(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        blocks = [(rf"^stage([0-{last}])", None), (r"^norm", (99999,))] if coarse else fine
        return dict(stem=r"^stage0\.patch_embed", blocks=blocks)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights, whose names are ours; BatchNorm counters that a file lacks start at 0.

    Args:
        state_dict: a flat file's tensors.
        model: the model to load.
    """
    counters = {name for name in model.state_dict() if name.endswith(".num_batches_tracked")}
    return {**{name: torch.tensor(0) for name in counters - set(state_dict)}, **state_dict}


_FOLDER = "https://1drv.ms/u/s!AhIXJn_J-blW9RzF3rMW7SsLHa8h?e=blQ0Al"


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 16, size // 16),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "crop_mode": "center" if size == 224 else "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stage0.patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/leoxiaobin/CvT",
        "paper_ids": "arXiv:2103.15808",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cvt_13.in1k": _cfg(),
        "cvt_21.in1k": _cfg(),
        "cvt_13_384.in22k_ft_in1k": _cfg(384),
        "cvt_13_384.in1k": _cfg(384),
        "cvt_21_384.in22k_ft_in1k": _cfg(384),
        "cvt_21_384.in1k": _cfg(384),
        "cvt_w24_384.in22k_ft_in1k": _cfg(384),
    }
)


def _tag(file: str, top1: float) -> Tag:
    return Tag(top1=top1, get=f"the authors' OneDrive folder {_FOLDER}, file {file}")


_published = partial(Published, source="README of the authors' repository; parameters counted from its code")

FAMILY = register_family(
    Family(
        name="cvt",
        categories=("hierarchical", "convolutional"),
        paper="CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, arXiv 2103.15808",
        code="https://github.com/leoxiaobin/CvT at 46ab3c832650a655becf60dd2fc5b8628ee5fbc8",
        code_license="MIT",
        weights_license="MIT",
        models={
            "cvt_13": _published(params=19_997_480, gmacs=4.5, top1=81.6),
            "cvt_21": _published(params=31_622_696, gmacs=7.1, top1=82.5),
            "cvt_13_384": _published(params=19_997_480, gmacs=16.3, top1=83.3),
            "cvt_21_384": _published(params=31_622_696, gmacs=24.9, top1=84.9),
            "cvt_w24_384": _published(params=277_196_392, gmacs=193.2, top1=87.6),
        },
        tags={
            "cvt_13.in1k": _tag("CvT-13-224x224-IN-1k.pth", 81.6),
            "cvt_21.in1k": _tag("CvT-21-224x224-IN-1k.pth", 82.5),
            "cvt_13_384.in22k_ft_in1k": _tag("CvT-13-384x384-IN-22k.pth", 83.3),
            "cvt_13_384.in1k": _tag("CvT-13-384x384-IN-1k.pth", 83.0),
            "cvt_21_384.in22k_ft_in1k": _tag("CvT-21-384x384-IN-22k.pth", 84.9),
            "cvt_21_384.in1k": _tag("CvT-21-384x384-IN-1k.pth", 83.3),
            "cvt_w24_384.in22k_ft_in1k": _tag("CvT-w24-384x384-IN-22k.pth", 87.6),
        },
    )
)


_SMALL = dict(embed_dims=(64, 192, 384), num_heads=(1, 3, 6))


def _create_cvt(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> CvT:
    model = build(
        CvT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=defaults,
        feature_taps=(0, 1, 2),
        **kwargs,
    )
    return cast(CvT, model)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13 at 224x224."""
    return _create_cvt("cvt_13", pretrained, dict(_SMALL, depths=(1, 2, 10)), kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21 at 224x224."""
    return _create_cvt("cvt_21", pretrained, dict(_SMALL, depths=(1, 4, 16)), kwargs)


@register_model
def cvt_13_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13 at 384x384."""
    return _create_cvt("cvt_13_384", pretrained, dict(_SMALL, depths=(1, 2, 10)), kwargs)


@register_model
def cvt_21_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21 at 384x384."""
    return _create_cvt("cvt_21_384", pretrained, dict(_SMALL, depths=(1, 4, 16)), kwargs)


@register_model
def cvt_w24_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-W24 at 384x384."""
    defaults = dict(embed_dims=(192, 768, 1024), depths=(2, 2, 20), num_heads=(3, 12, 16))
    return _create_cvt("cvt_w24_384", pretrained, defaults, kwargs)
