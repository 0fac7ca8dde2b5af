"""EViT: a DeiT that drops the patches its class token does not look at.

Paper: Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, Liang et
al., ICLR 2022, arXiv 2202.07800. Code: https://github.com/youweiliang/evit at
5ca95a7cf4a8637193284895c5bc0dd9dc365982.

A pruning block keeps, after its attention and before its MLP, the fraction of the tokens that the class token
attends to most, and may fuse the others into one. What the paper leaves open follows the code:
- the fused token is the sum of score * token with scores as they are, not normalised;
- the fused token is an ordinary token later on: it counts there, and can be dropped or fused again;
- where nothing would be dropped nothing happens, no fusion either.
Ours, deliberately: a non-square input is resampled from the right grid also where its number of patches
equals the table's (the code resizes squares only, and only when the numbers differ); and the scores are taken
before attention dropout in training, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from timm.models._input import get_pretrained_grid_size, update_model_input_size
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitzoo.checkpoint import resize_pos_grid
from vitzoo.layers.token import (
    ScoredAttention,
    prune_tokens,
    scatter_tokens,
    track_patches,
)
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family

__all__ = ["EViT"]

POOLS = ("", "token", "avg")
_REPO = "https://github.com/youweiliang/evit"
_COMMIT = "5ca95a7cf4a8637193284895c5bc0dd9dc365982"


def _checked_rate(rate: float, name: str) -> float:
    if not 0.0 < rate <= 1.0:  # refuses NaN, too
        raise ValueError(f"{name} {rate} is not in (0, 1]; 1 keeps every token")
    return float(rate)


@torch.fx.wrap
@register_notrace_function
def checked_image(
    x: Tensor, in_chans: int, size: tuple[int, int] | None, multiple: tuple[int, int]
) -> Tensor:
    """Return an image (B, in_chans, H, W) if it has that size, or those multiples where `size` is None.

    Raises:
        ValueError: another shape; the message says what to do.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"input has shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    height, width = x.shape[-2:]
    if size is not None and (height != size[0] or width != size[1]):
        raise ValueError(
            f"input is {height}x{width}, the model was made for {size[0]}x{size[1]}; call "
            f"set_input_size(({height}, {width})) or create it with dynamic_img_size=True"
        )
    if height % multiple[0] or width % multiple[1]:
        raise ValueError(
            f"input {height}x{width} is not a multiple of patch_size {multiple[0]}x{multiple[1]}; "
            "resize it or create the model with dynamic_img_pad=True"
        )
    return x


class EViTBlock(Block):
    """timm's pre-norm block, which may drop tokens between its attention and its MLP.

    Attributes:
        base_keep_rate: the rate it was built with; below 1 it is a pruning block.
        keep_rate: the rate it runs with.
        keep_tokens: number of tokens to keep instead, None to go by the rate.
        fuse_token: append a fused token.
    """

    base_keep_rate: float = 1.0
    keep_rate: float = 1.0
    keep_tokens: int | None = None
    fuse_token: bool = False

    def forward(self, x: Tensor, return_index: bool = False) -> Any:
        """Run the block.

        Args:
            x: tokens, (B, L, C), class token first.
            return_index: also return which tokens were kept.

        Returns:
            Tokens, (B, L', C); with `return_index` a pair of that and the kept tokens' numbers, (B, K),
            counted without the class token, None if none was dropped.
        """
        index = None
        if self.keep_rate >= 1.0 and self.keep_tokens is None:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        else:
            attn, scores = self.attn(self.norm1(x), return_scores=True)
            x = x + self.drop_path1(self.ls1(attn))
            x, index = prune_tokens(x, scores, self.keep_rate, self.keep_tokens, self.fuse_token)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (x, index) if return_index else x


class EViT(VisionTransformer):
    """timm's VisionTransformer with pruning blocks; parameters are exactly DeiT's, whatever the arguments.

    timm's options that do without a class token, add others or drop patches at random have no meaning here
    and are not arguments.

    Args:
        img_size: height and width, multiples of `patch_size` (unless dynamic_img_pad).
        global_pool: "token", "avg" (over the tokens left) or "".
        base_keep_rate: share of the tokens that a pruning block keeps, in (0, 1].
        drop_loc: numbers of the pruning blocks, from 0.
        fuse_token: fuse the dropped tokens into one instead of forgetting them.
        dynamic_img_size: accept any multiple of the patch size; positions are resampled at each call.
        dynamic_img_pad: accept any size; the image is padded to a multiple.
        others: as in timm.

    Raises:
        ValueError: a keep rate, a block number, a pooling or an image size that is not allowed.
    """

    pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        base_keep_rate: float = 0.7,
        drop_loc: Sequence[int] = (3, 6, 9),
        fuse_token: bool = False,
        init_values: float | None = None,
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        norm_layer: LayerType | None = None,
        act_layer: LayerType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        base_keep_rate = _checked_rate(base_keep_rate, "base_keep_rate")
        for number in drop_loc:
            if not 0 <= number < depth:
                raise ValueError(
                    f"drop_loc {tuple(drop_loc)} names block {number}, a model of depth {depth} has blocks "
                    f"0 .. {depth - 1}"
                )
        _check_pool(global_pool)
        if not dynamic_img_pad:
            _check_multiple(img_size, patch_size)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            init_values=init_values,
            fc_norm=fc_norm,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init=weight_init,
            norm_layer=norm_layer,
            act_layer=act_layer,
            block_fn=EViTBlock,
            attn_layer=ScoredAttention,
            device=device,
            dtype=dtype,
        )
        self.base_keep_rate = base_keep_rate
        self.drop_loc = tuple(drop_loc)
        self.fuse_token = fuse_token
        for number in drop_loc:
            block = self.blocks[number]
            block.base_keep_rate = block.keep_rate = base_keep_rate
        for block in self.blocks:
            block.fuse_token = fuse_token

    @property
    def keep_rates(self) -> tuple[float, ...]:
        """The rate of every block."""
        return tuple(block.keep_rate for block in self.blocks)

    def set_keep_rate(self, rate: float | Sequence[float] | None) -> None:
        """Change what the pruning blocks keep, from the next call on; ends `set_keep_tokens`.

        As in the authors' code only blocks built with a rate below 1 (`drop_loc`) prune; the others' rates
        are ignored, with a warning if that leaves nothing to prune. The setting is not saved with the model.

        Args:
            rate: one for all, one a block, or None for the rate the model was built with.

        Raises:
            ValueError: a rate outside (0, 1], or a wrong number of rates.
        """
        if rate is None:
            rates = [block.base_keep_rate for block in self.blocks]
        else:
            rates = [_checked_rate(r, "keep rate") for r in self._one_a_block(rate, "keep rates")]
            if min(rates) < 1.0 and all(block.base_keep_rate >= 1.0 for block in self.blocks):
                warnings.warn(
                    f"keep rate {rate} changes nothing: no block was built to prune; create the model with "
                    "base_keep_rate below 1 and drop_loc, or use set_keep_tokens",
                    stacklevel=2,
                )
        for block, value in zip(self.blocks, rates, strict=True):
            block.keep_rate = value if block.base_keep_rate < 1.0 else 1.0
            block.keep_tokens = None

    def set_keep_tokens(self, tokens: int | Sequence[int | None] | None) -> None:
        """Keep a number of tokens instead of a share, in any block, from the next call on.

        Args:
            tokens: number to keep besides the class token: one for all blocks, one a block (None: that block
                goes by its rate), or None to go by the rates again. A fused token counts like any other.

        Raises:
            ValueError: a number below 1, or a wrong number of numbers. The next call raises it where a number
                exceeds the tokens there are.
        """
        numbers = self._one_a_block(tokens, "token numbers")
        for number in numbers:
            if number is not None and number < 1:
                raise ValueError(f"keep tokens {number} is below 1; at least one token must be kept")
        for block, number in zip(self.blocks, numbers, strict=True):
            block.keep_tokens = number

    def _one_a_block(self, values: Any, name: str) -> list[Any]:
        if not isinstance(values, Sequence):
            return [values] * len(self.blocks)
        if len(values) != len(self.blocks):
            raise ValueError(f"{len(values)} {name} were given, the model has {len(self.blocks)} blocks")
        return list(values)

    def _pos_embed(self, x: Tensor) -> Tensor:
        pos: Tensor = self.pos_embed
        if self.dynamic_img_size:
            batch, height, width, channels = x.shape
            pos = _resized(pos, self.patch_embed.grid_size, (height, width))
            x = x.view(batch, -1, channels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + pos)

    def _embed(self, x: Tensor) -> Tensor:
        embed = self.patch_embed
        size = None if self.dynamic_img_size else embed.img_size
        x = checked_image(x, self.in_chans, size, (1, 1) if embed.dynamic_img_pad else embed.patch_size)
        return self._pos_embed(embed(x))

    def _advance(
        self, block: nn.Module, x: Tensor, patches: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run one block; return tokens, their patches, and the patches it kept (None if it dropped none)."""
        if self.grad_checkpointing:
            x, index = checkpoint(block, x, True)
        else:
            x, index = block(x, True)
        if index is None:
            return x, patches, None
        kept = track_patches(patches, index, False)
        return x, track_patches(patches, index, True) if block.fuse_token else kept, kept

    def forward_features(self, x: Tensor, return_kept: bool = False) -> Any:
        """Return the tokens after the last norm.

        Args:
            x: image, (B, in_chans, H, W).
            return_kept: also say which patches survived.

        Returns:
            Tokens, (B, L', C), class token first, then as the last pruning block ordered them. With
            `return_kept` a pair of that and a list with, for each block that dropped tokens, the patches of
            the input grid that it kept, (B, K) by falling score, -1 for a fused token
            (`vitzoo.layers.token.patch_mask` makes a mask of it).

        Raises:
            ValueError: an input of another size.
        """
        x = self._embed(x)
        if not return_kept and not self.grad_checkpointing:
            return self.norm(self.blocks(x))
        survivors = []
        patches: Tensor | None = None
        for block in self.blocks:
            x, patches, kept = self._advance(block, x, patches)
            if kept is not None:
                survivors.append(kept)
        x = self.norm(x)
        return (x, survivors) if return_kept else x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of an image (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the final tokens and the feature maps after some blocks, as timm's does.

        Tokens that are left stand at the slots of their patches, zeros elsewhere; fused tokens are left out.

        Args:
            x: image, (B, in_chans, H, W).
            indices: last n blocks if an integer, all if None, else the blocks' numbers.
            return_prefix_tokens: pair each map with the class token, (B, 1, C).
            norm: apply the final norm to the tokens of each map.
            stop_early: stop at the last block that is asked for.
            output_fmt: "NCHW", or "NLC" for (B, H*W, C).
            intermediates_only: leave out the final tokens.
            output_dict: return a dict of "image_features", "image_intermediates" and, if asked for,
                "image_intermediates_prefix".

        Raises:
            ValueError: another `output_fmt`, or an input of another size.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not one of 'NCHW', 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = self._embed(x)
        patches: Tensor | None = None
        maps, prefixes = [], []
        for number, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x, patches, _ = self._advance(block, x, patches)
            if number in take:
                tokens = self.norm(x) if norm else x
                prefixes.append(tokens[:, :1])
                tap = scatter_tokens(tokens[:, 1:], patches, grid[0] * grid[1])
                if output_fmt == "NCHW":
                    tap = tap.transpose(1, 2).reshape(x.shape[0], -1, *grid).contiguous()
                maps.append(tap)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        found: list[Any] = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return found if intermediates_only else (self.norm(x), found)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if `global_pool` is not None.

        Raises:
            ValueError: a pooling the family does not have.
        """
        if global_pool is not None:
            _check_pool(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Adapt the position table, and the patch embedding if `patch_size` is given, to another input size.

        Raises:
            ValueError: a size that is not a multiple of the patch size.
        """
        embed = self.patch_embed
        size = embed.img_size if img_size is None else to_2tuple(img_size)
        if not embed.dynamic_img_pad:
            _check_multiple(size, patch_size or embed.patch_size)
        old = embed.grid_size
        embed.set_input_size(img_size=size, patch_size=patch_size)
        if embed.grid_size != old:
            pos = _resized(self.pos_embed.detach(), old, embed.grid_size)
            self.pos_embed = nn.Parameter(pos, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, embed.img_size, patch_size=patch_size)


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool {global_pool!r} is not one of {POOLS} that EViT has")


def _check_multiple(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    size, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if size[0] % patch[0] or size[1] % patch[1] or min(size) < 1:
        shown = [pair[0] if pair[0] == pair[1] else pair for pair in (size, patch)]
        raise ValueError(f"img_size {shown[0]} is not a multiple of patch_size {shown[1]}")


def _resized(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize the grid part of a position table (1, 1 + P, C); the class token's row stays."""
    if old == new:
        return pos
    return torch.cat([pos[:, :1], resize_pos_grid(pos[:, 1:], old, new)], dim=1)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt the authors' weights, or plain DeiT's, to the model: names are the same, positions are resampled.

    Args:
        state_dict: name -> tensor.
        model: the model to load into.

    Raises:
        ValueError: weights with a distillation token, or a position table of unknown shape.
    """
    if "dist_token" in state_dict or any(name.startswith("head_dist.") for name in state_dict):
        raise ValueError(
            "these are weights of a distilled DeiT, EViT has no distillation token: take the file of the "
            "DeiT trained without distillation"
        )
    pos, embed = state_dict.get("pos_embed"), cast(Any, model).patch_embed
    if pos is None or pos.shape[1] < 2:
        return state_dict
    count = pos.shape[1] - 1
    old = get_pretrained_grid_size(model, state_dict.get("patch_embed.proj.weight"), count)
    if old is None:
        side = round(count**0.5)
        if side * side != count:
            raise ValueError(
                f"pos_embed has {count} patches, not a square: say at which image size it was trained, "
                "pretrained_cfg_overlay={'file': ..., 'input_size': (3, height, width)}"
            )
        old = (side, side)
    return {**state_dict, "pos_embed": _resized(pos, old, embed.grid_size)}


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "Apache-2.0",
        "origin_url": _REPO,
        **kwargs,
    }


def _deit(name: str) -> dict[str, Any]:
    url = f"https://dl.fbaipublicfiles.com/deit/{name}.pth"
    return _cfg(url, origin_url="https://github.com/facebookresearch/deit")


# keep rate, fused: top-1, GMACs and Google Drive file, as the authors' README gives them
_FILES = {
    (0.7, False): (79.4, 3.0, "1VCZGphW34rFWZDXOoF7XO4EJfRLZ-YB8"),
    (0.5, False): (78.4, 2.3, "1qsPeLN5ytLO8pM7lUuj5bi6pyMhjiSJO"),
    (0.6, False): (79.1, 2.6, "1okYcKryyD6FFPG9v5r40R28SRNfVZ5X0"),
    (0.8, False): (79.7, 3.5, "1zdFbHk-gOw_Wiid5_Z8NFcBa1HMI-JF-"),
    (0.9, False): (79.9, 4.0, "1tSaPLged8ED2RTiN5ttSmeTNIw1aNNwV"),
    (0.5, True): (78.5, 2.3, "1-nyxAlRWjD2icbgj3Y3YWcCmYj9sTgfD"),
    (0.6, True): (78.9, 2.6, "1D1m067jDbyG0g2UjyBMaJ4NTT2Ad8vrv"),
    (0.7, True): (79.5, 3.0, "1FfvdEBss9f8gexjqEY8vOSUQe_8qwYuL"),
    (0.8, True): (79.8, 3.5, "1BTJyIe0zVK3zYXz3BzIlSC4YZCnZu7cJ"),
    (0.9, True): (79.8, 4.0, "1CmROmlLV-7nyYY-Bhph8_5ut3wFwqvny"),
}


def _tag(rate: float, fused: bool) -> str:
    return f"keep{rate}_fuse_in1k" if fused else f"keep{rate}_in1k"


default_cfgs = generate_default_cfgs(
    {
        "evit_tiny_patch16_224.deit_in1k": _deit("deit_tiny_patch16_224-a1311bcf"),
        "evit_small_patch16_224.deit_in1k": _deit("deit_small_patch16_224-cd65a155"),
        # The star makes the authors' own setting the default although code can only fetch the DeiT file; timm
        # heeds it only after every tag with an address.
        **{
            f"evit_small_patch16_224.{_tag(*key)}{'*' if key == (0.7, False) else ''}": _cfg()
            for key in _FILES
        },
        "evit_base_patch16_224.deit_in1k": _deit("deit_base_patch16_224-b5f2ef4d"),
    }
)

_NOT_PUBLISHED = (
    "parameters counted from the authors' code; no figures and no EViT weights were published for this size"
)

FAMILY = register_family(
    Family(
        name="evit",
        categories=("token-pruning",),
        paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, "
        "ICLR 2022, arXiv 2202.07800",
        code=f"{_REPO}/tree/{_COMMIT}",
        code_license="Apache-2.0",
        weights_license="Apache-2.0 (the repositories' licence; none is stated for the files). The deit_in1k "
        "tags are DeiT's weights, under pruning they were not fine-tuned for",
        models={
            "evit_tiny_patch16_224": Published(params=5_717_416, source=_NOT_PUBLISHED),
            "evit_small_patch16_224": Published(
                params=22_050_664,
                gmacs=3.0,
                top1=79.4,
                source="authors' README, EViT-DeiT-S, keep rate 0.7 without fusion",
            ),
            "evit_base_patch16_224": Published(params=86_567_656, source=_NOT_PUBLISHED),
        },
        tags={
            f"evit_small_patch16_224.{_tag(rate, fused)}": Tag(
                args={"base_keep_rate": rate, "fuse_token": fused},
                gmacs=gmacs,
                top1=top1,
                get=f"https://drive.google.com/file/d/{file}/view",
            )
            for (rate, fused), (top1, gmacs, file) in _FILES.items()
        },
    )
)


def _evit(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> EViT:
    model = build(
        EViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults={"patch_size": 16, "depth": 12, **defaults},
        feature_taps=(2, 5, 8, 11),
        **kwargs,
    )
    return cast(EViT, model)


@register_model
def evit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT of DeiT-Ti's size."""
    return _evit("evit_tiny_patch16_224", pretrained, {"embed_dim": 192, "num_heads": 3}, kwargs)


@register_model
def evit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT of DeiT-S's size, the one whose weights the authors publish."""
    return _evit("evit_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 6}, kwargs)


@register_model
def evit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT of DeiT-B's size."""
    return _evit("evit_base_patch16_224", pretrained, {"embed_dim": 768, "num_heads": 12}, kwargs)
