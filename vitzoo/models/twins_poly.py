"""Twins-SVT with adaptive polyphase anchoring: its class does not change when the image shifts circularly.

Paper: Ding et al., "Reviving Shift Equivariance in Vision Transformers", arXiv 2306.07470.
Code: https://github.com/willding123/Shift-Equivariant-Vision-Transformers at
c8cd2ef40b435d9615c790b2461694ba89a36be4, models/polytwins.py.

A variation of timm's Twins with the same parameters and names, so plain Twins-SVT weights load. Maps are
anchored before the first embedding and before every block, and the positional convolutions wrap around.
Shifts accumulate and are never undone, as in the code: tokens and feature maps are shifted circularly against
the input, each stage by its own amount, which `forward_features(x, return_anchors=True)` tells. timm's tests
count Twins among the token models.

One deviation, at initialisation only: the norms of the embeddings start at weights around one, not at one.
After a norm of equal weights all tokens have the same length, so that a window's phases tie to seven digits
and rounding would choose the anchors of an untrained model, otherwise in each runtime.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.twins import Block, GlobalSubSampleAttn, LocallyGroupedAttn, PosConv, Twins
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.layers.polyphase import (
    check_square,
    circular_pad_tokens,
    polyphase_anchor,
    polyphase_anchor_tokens,
)
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family

Size = tuple[int, int]


@register_notrace_module
class WindowAttention(LocallyGroupedAttn):
    """timm's locally-grouped attention for maps that the window divides, over four axes.

    timm hands `scaled_dot_product_attention` five, which fuses no kernel on CPU and which the ONNX exporter
    refuses.
    """

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Attend within windows of ws x ws; x (B, H*W, C), size (H, W)."""
        (height, width), ws, channels = size, self.ws, x.shape[-1]
        rows, cols = height // ws, width // ws
        x = x.reshape(-1, rows, ws, cols, ws, channels).transpose(2, 3)
        qkv = self.qkv(x).reshape(-1, ws * ws, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B*windows, heads, ws*ws, head_dim)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(-1, rows, cols, ws, ws, channels).transpose(2, 3)
        return self.proj_drop(self.proj(x.reshape(-1, height * width, channels)))


class CircularPosConv(PosConv):
    """timm's positional convolution on a torus, with its residual."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Add a 3x3 depthwise convolution of the map to the tokens x (B, H*W, C); size (H, W)."""
        conv = self.proj[0]
        y = F.conv2d(circular_pad_tokens(x, size), conv.weight, conv.bias, groups=conv.groups)
        return x + y.flatten(2).transpose(1, 2)


class PolyBlock(Block):
    """timm's Twins block with `WindowAttention`; `phase` is the grid that its attention samples on."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        ws: int = 1,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            ws=ws,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        if ws > 1:
            self.attn = WindowAttention(dim, num_heads, attn_drop, proj_drop, ws, device=device, dtype=dtype)

    @property
    def phase(self) -> int:
        """Return the window's side, or the stride of the sub-sampled keys; 1 for none."""
        if isinstance(self.attn, GlobalSubSampleAttn):
            return int(self.attn.sr_ratio)
        return int(self.attn.ws)


class PolyTwins(Twins):
    """Twins-SVT anchored to its own grid; see the file's head.

    Square inputs only, whose stage maps every window and stride divides: multiples of 224 for the published
    variants.

    Args:
        img_size: nominal input size; changes no parameter but is checked and remembered.
        global_pool: "avg" or "".
        kwargs: as for timm's `Twins`.

    Raises:
        ValueError: an input size or a pooling that the design does not allow.
    """

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        wss: Sequence[int] = (7, 7, 7, 7),
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # a stage's map must hold whole windows and whole strides
        unit = math.lcm(
            *(
                math.lcm(ws, sr) * patch_size * 2**i
                for i, (ws, sr) in enumerate(zip(wss, sr_ratios, strict=True))
            )
        )
        check_square(to_2tuple(img_size), unit, "img_size")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            global_pool=_checked_pool(global_pool),
            embed_dims=embed_dims,
            sr_ratios=sr_ratios,
            wss=wss,
            block_cls=PolyBlock,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.size_unit = unit
        self.patch_size = patch_size
        self.pos_block = nn.ModuleList(
            [CircularPosConv(dim, dim, device=device, dtype=dtype) for dim in embed_dims]
        )
        self.pos_block.apply(self._init_weights)
        self._untie()
        for stage, info in enumerate(self.feature_info):
            info["module"] = f"blocks.{stage}"

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise linear layers, norms and convolutions as timm's Twins does.

        Args:
            needs_reset: accepted as in timm's ViT; no other kind of parameter exists here.
        """
        self.apply(self._init_weights)
        self._untie()

    def _untie(self) -> None:
        for embed in self.patch_embeds:
            nn.init.trunc_normal_(embed.norm.weight, mean=1.0, std=0.02)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, keeping the pooling unless another is named."""
        super().reset_classifier(num_classes, None if global_pool is None else _checked_pool(global_pool))

    def set_input_size(self, img_size: int | Size | None = None) -> None:
        """Set the nominal input size, which no parameter depends on.

        Raises:
            ValueError: not square, or not a multiple of what windows and strides need.
        """
        if img_size is None:
            return
        size = to_2tuple(img_size)
        check_square(size, self.size_unit, "img_size")
        for stage, embed in enumerate(self.patch_embeds):
            side = size[0] // (self.patch_size * 2**stage)
            embed.img_size = (side * embed.patch_size[0],) * 2
            embed.H, embed.W, embed.num_patches = side, side, side * side
        update_model_input_size(self, size)

    def _block(self, x: Tensor, block: PolyBlock, size: Size) -> tuple[Tensor, Tensor | None]:
        anchors = None
        if block.phase > 1:
            x, anchors = polyphase_anchor_tokens(x, size, (block.phase, block.phase))
        return block(x, size), anchors

    def _stages(
        self, x: Tensor, count: int, take: Sequence[int] = (), norm: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `count` stages: tokens, the maps of the stages in `take`, each call's anchors."""
        check_square(x.shape[-2:], self.size_unit, "input")
        x, first = polyphase_anchor(x, (self.patch_size, self.patch_size))
        anchors, maps = [first], []
        stages = zip(self.patch_embeds, self.pos_drops, self.blocks, self.pos_block, strict=True)
        for index, (embed, drop, blocks, pos_conv) in enumerate(stages):
            if index == count:
                break
            x, size = embed(x)
            x = drop(x)
            for j, block in enumerate(blocks):
                if self.grad_checkpointing and self.training:
                    x, chosen = checkpoint(self._block, x, block, size)
                else:
                    x, chosen = self._block(x, block, size)
                if chosen is not None:
                    anchors.append(chosen)
                if j == 0:
                    x = pos_conv(x, size)
            last = index == len(self.blocks) - 1
            if index in take:
                y = self.norm(x) if norm and last else x  # the final norm is of the last stage's width
                maps.append(y.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
            if not last:
                # channels last in memory, as the next convolution likes it
                x = x.unflatten(1, size).permute(0, 3, 1, 2)
        return x, maps, anchors

    def forward_features(self, x: Tensor, return_anchors: bool = False) -> Any:
        """Return the tokens before pooling.

        Args:
            x: image, (B, in_chans, H, W), H = W a multiple of 224.
            return_anchors: also return the phase chosen at each anchoring call, (B, calls, 2) as (row,
                column).

        Returns:
            Normalised tokens (B, L, C) of the last stage, shifted circularly against the input; and the
            anchors.

        Raises:
            ValueError: an input size that the design does not allow.
        """
        x, _, anchors = self._stages(x, len(self.blocks))
        x = self.norm(x)
        return (x, torch.stack(anchors, dim=1)) if return_anchors else x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of an image (B, in_chans, H, W)."""
        # as timm's, but defined here: FX keeps whole only functions that it meets in the file of `forward`
        return cast(Tensor, self.forward_head(self.forward_features(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final tokens and the feature maps of some stages, shifted circularly against the input.

        Args:
            x: image, (B, in_chans, H, W).
            indices: last n stages if an integer, all if None, else the stages' numbers.
            norm: normalise the last stage's map as the classifier would.
            stop_early: stop at the last stage that is asked for.
            output_fmt: "NCHW" only.
            intermediates_only: leave out the final tokens.

        Returns:
            (tokens, [map, ...]) or [map, ...]; a map is (B, C, H, W).

        Raises:
            ValueError: another `output_fmt`, or an input size that the design does not allow.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not available, only 'NCHW'")
        take, last = feature_take_indices(len(self.blocks), indices)
        count = last + 1 if stop_early else len(self.blocks)
        x, maps, _ = self._stages(x, count, take, norm)
        if intermediates_only:
            return maps
        return (self.norm(x) if count == len(self.blocks) else x), maps


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("", "avg"):
        raise ValueError(f"global_pool {global_pool!r} is not one of ('', 'avg') that PolyTwins has")
    return global_pool


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as they are: the authors' names, and those of plain Twins-SVT, are ours.

    Args:
        state_dict: a file's tensors.
        model: the model to load.
    """
    return state_dict


_FOLDER = "https://drive.google.com/drive/folders/193u1uxb-pWS-JeeqbG1T0MZDVXSVVqfp?usp=share_link"
_GET = f"the authors' Google Drive folder {_FOLDER}"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embeds.0.proj",
        "classifier": "head",
        "origin_url": "https://github.com/willding123/Shift-Equivariant-Vision-Transformers",
        "paper_ids": "arXiv:2306.07470",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {"twins_svt_small_poly.in1k": _cfg(), "twins_svt_base_poly.in1k": _cfg()}
)

_SOURCE = "parameters and multiply-accumulates counted from the authors' code"

FAMILY = register_family(
    Family(
        name="twins_poly",
        categories=("equivariant", "hierarchical"),
        paper="Reviving Shift Equivariance in Vision Transformers, arXiv 2306.07470",
        code="https://github.com/willding123/Shift-Equivariant-Vision-Transformers at "
        "c8cd2ef40b435d9615c790b2461694ba89a36be4",
        code_license="none stated",
        weights_license="none stated",
        models={
            "twins_svt_small_poly": Published(params=24_060_776, gmacs=2.93, source=_SOURCE),
            "twins_svt_base_poly": Published(params=56_070_952, gmacs=8.56, source=_SOURCE),
        },
        tags={
            "twins_svt_small_poly.in1k": Tag(get=_GET),
            "twins_svt_base_poly.in1k": Tag(get=_GET),
        },
    )
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> PolyTwins:
    model = build(PolyTwins, variant, pretrained, filter_fn=checkpoint_filter_fn, defaults=defaults, **kwargs)
    return cast(PolyTwins, model)


@register_model
def twins_svt_small_poly(pretrained: bool = False, **kwargs: Any) -> PolyTwins:
    """Twins-SVT-S with polyphase anchoring."""
    defaults = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), num_heads=(2, 4, 8, 16))
    return _create("twins_svt_small_poly", pretrained, defaults, kwargs)


@register_model
def twins_svt_base_poly(pretrained: bool = False, **kwargs: Any) -> PolyTwins:
    """Twins-SVT-B with polyphase anchoring."""
    defaults = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create("twins_svt_base_poly", pretrained, defaults, kwargs)
