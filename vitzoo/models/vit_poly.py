"""ViT with adaptive polyphase anchoring: its class does not change when the image shifts circularly.

Paper: Ding et al., "Reviving Shift Equivariance in Vision Transformers", arXiv 2306.07470.
Code: https://github.com/willding123/Shift-Equivariant-Vision-Transformers at
c8cd2ef40b435d9615c790b2461694ba89a36be4, models/vision_transformer.py.

A variation of timm's VisionTransformer: the image is anchored to the patch grid, patches are normalised after
their embedding, and a circular 3x3 convolution gives position in place of the table. The shift is not undone,
so tokens and feature maps are shifted circularly against the input, by what `forward_features(x,
return_anchors=True)` tells.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import PatchEmbed, to_2tuple
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.layers.polyphase import check_square, circular_pad_tokens, polyphase_anchor, square_side
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family


class CircularPosition(nn.Module):
    """Position from a depthwise 3x3 convolution on a torus, with its residual."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolution of the square map to its tokens x (B, L, C)."""
        side = square_side(x)
        y = F.conv2d(
            circular_pad_tokens(x, (side, side)), self.proj.weight, self.proj.bias, groups=self.proj.groups
        )
        return x + y.flatten(2).transpose(1, 2)


class PolyViT(VisionTransformer):
    """ViT anchored to its patch grid; see the file's head.

    Any square input whose side is a multiple of the patch size.

    Args:
        img_size: nominal input size; changes no parameter but is checked and remembered.
        patch_size: side of a patch.
        embed_dim: width.
        kwargs: as for timm's `VisionTransformer`; it has no `pos_embed` to set.

    Raises:
        ValueError: an input size that the design does not allow.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        check_square(to_2tuple(img_size), patch_size, "img_size")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            pos_embed="none",
            embed_layer=partial(PatchEmbed, strict_img_size=False),
            embed_norm_layer=nn.LayerNorm,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.pos_conv = CircularPosition(embed_dim, device=device, dtype=dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters by depth, for layer-wise learning rates."""
        matcher = cast(dict[str, Any], super().group_matcher(coarse))
        return {**matcher, "stem": rf"{matcher['stem']}|pos_conv"}

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Set the nominal input size, and the patch size if given, resampling the patch embedding.

        Raises:
            ValueError: not square, or not a multiple of the patch size.
        """
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        size = to_2tuple(img_size or self.patch_embed.img_size)
        check_square(patch, 1, "patch_size")
        check_square(size, patch[0], "img_size")
        super().set_input_size(size, None if patch_size is None else patch)

    def _anchor(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patch = self.patch_embed.patch_size
        check_square(x.shape[-2:], patch[0], "input")
        return polyphase_anchor(x, patch)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.dynamic_img_size:
            x = x.flatten(1, 2)
        return self.pos_drop(super()._pos_embed(self.pos_conv(x)))

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        return_anchors: bool = False,
    ) -> Any:
        """Return the tokens before pooling.

        Args:
            x: image, (B, in_chans, H, W), H = W a multiple of the patch size.
            attn_mask: as in timm's ViT.
            is_causal: as in timm's ViT.
            return_anchors: also return the phase chosen, (B, 1, 2) as (row, column).

        Returns:
            Tokens (B, 1 + L, C), the class token first, the others shifted circularly against the input; and
            the anchors.

        Raises:
            ValueError: an input size that the design does not allow.
        """
        x, anchors = self._anchor(x)
        x = super().forward_features(x, attn_mask, is_causal)
        return (x, anchors[:, None]) if return_anchors else x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return logits (B, num_classes) of an image (B, in_chans, H, W); arguments as in timm's ViT."""
        # as timm's, but defined here: FX keeps whole only functions that it meets in the file of `forward`
        return cast(Tensor, self.forward_head(self.forward_features(x, attn_mask, is_causal)))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what timm's ViT returns; maps are shifted circularly against the input.

        Args:
            x: image, (B, in_chans, H, W).
            *args: as for timm's `VisionTransformer.forward_intermediates`.
            **kwargs: likewise.

        Raises:
            ValueError: an input size that the design does not allow.
        """
        return super().forward_intermediates(self._anchor(x)[0], *args, **kwargs)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights as they are: the names are theirs.

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
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "origin_url": "https://github.com/willding123/Shift-Equivariant-Vision-Transformers",
        "paper_ids": "arXiv:2306.07470",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_small_patch16_224_poly.augreg_in1k_ft_in1k": _cfg(),
        "vit_base_patch16_224_poly.in1k": _cfg(),
    }
)

_published = partial(Published, source="parameters counted from the authors' code, ViT's GMACs as in timm")

FAMILY = register_family(
    Family(
        name="vit_poly",
        categories=("equivariant",),
        paper="Reviving Shift Equivariance in Vision Transformers, arXiv 2306.07470",
        code="https://github.com/willding123/Shift-Equivariant-Vision-Transformers at "
        "c8cd2ef40b435d9615c790b2461694ba89a36be4",
        code_license="none stated",
        weights_license="none stated",
        models={
            "vit_small_patch16_224_poly": _published(params=21_979_624, gmacs=4.61),
            "vit_base_patch16_224_poly": _published(params=86_425_576, gmacs=17.58),
        },
        tags={
            "vit_small_patch16_224_poly.augreg_in1k_ft_in1k": Tag(get=_GET),
            "vit_base_patch16_224_poly.in1k": Tag(get=_GET),
        },
    )
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> PolyViT:
    model = build(
        PolyViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=defaults,
        feature_taps=(9, 10, 11),
        **kwargs,
    )
    return cast(PolyViT, model)


@register_model
def vit_small_patch16_224_poly(pretrained: bool = False, **kwargs: Any) -> PolyViT:
    """ViT-S/16 with polyphase anchoring."""
    defaults = dict(embed_dim=384, depth=12, num_heads=6)
    return _create("vit_small_patch16_224_poly", pretrained, defaults, kwargs)


@register_model
def vit_base_patch16_224_poly(pretrained: bool = False, **kwargs: Any) -> PolyViT:
    """ViT-B/16 with polyphase anchoring."""
    defaults = dict(embed_dim=768, depth=12, num_heads=12)
    return _create("vit_base_patch16_224_poly", pretrained, defaults, kwargs)
