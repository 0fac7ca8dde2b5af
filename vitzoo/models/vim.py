"""Vim, Vision Mamba: a plain stack of bidirectional state-space blocks with the class token in the middle.

Paper: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space
Model", ICML 2024, arXiv 2401.09417.
Code: https://github.com/hustvl/Vim at dd0358ad1e42701f22afbefa0717cc8825cf9f45 (Apache-2.0),
vim/models_mamba.py, mamba-1p1p1/mamba_ssm/modules/mamba_simple.py.

Where paper and code differ the code is followed: a block halves the sum of its two directions, and the drop
path of block i is the linear schedule's value for block i - 1, applied to what comes in, with one more at
the full rate before the final norm. Arguments of the code that no published model uses (rotary positions,
other places of the class token, one-directional blocks) are left out. `drop_rate` is the classifier's
dropout, as in timm; `pos_drop_rate` is what the authors call drop_rate. `forward_features` gives all tokens,
normalised; the classifier reads token M // 2 of M + 1.

Position tables at another size: the authors' fine-tuning loader takes row 0 for the class token and rows 1..
for the grid, although the class token's row is M // 2, and resizes by bicubic interpolation. So do we, at
load, in `set_input_size` and with `dynamic_img_size`: the stride-8 weights began that way. The authors'
loader knows square grids only; ours takes a square table to any (h, w) in the same manner.

Legend: B batch, C channels, H W height and width, M patches, L = M + 1 tokens.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    calculate_drop_path_rates,
    lecun_normal_,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitzoo.checkpoint import resize_pos_grid
from vitzoo.kernels.add_norm import add_rms_norm
from vitzoo.layers.norm import RMSNorm
from vitzoo.layers.ssm import BidirectionalMamba
from vitzoo.models._base import Backbone
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family

_NORM_EPS = 1e-5

# it checks shapes and chooses a backend: FX keeps the call whole
register_notrace_function(add_rms_norm)


@register_notrace_function
def resample_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table as the authors' loader does: row 0 stays, the others are a grid (see above).

    Args:
        pos_embed: (1, 1 + old[0] * old[1], C).
        old: height and width of the present grid.
        new: those wanted.

    Returns:
        (1, 1 + new[0] * new[1], C), dtype of `pos_embed`.
    """
    if old == new:
        return pos_embed
    return torch.cat((pos_embed[:, :1], resize_pos_grid(pos_embed[:, 1:], old, new)), dim=1)


@register_notrace_function
def check_input(x: Tensor, in_chans: int, img_size: tuple[int, int], patch_size: int, strict: bool) -> Tensor:
    """Return `x` if the model takes it; a function of its own, and a public one, so that FX keeps it whole.

    Args:
        x: image, (B, in_chans, H, W).
        in_chans: channels of the model.
        img_size: height and width the model was built for.
        patch_size: side of a patch.
        strict: refuse every other size.

    Raises:
        ValueError: another shape; the message names both.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"input has shape {tuple(x.shape)}, expected (B, {in_chans}, H, W)")
    height, width = x.shape[-2:]
    if strict and (height, width) != img_size:
        raise ValueError(
            f"input is {height}x{width}, the model was built for {img_size[0]}x{img_size[1]}: resize the "
            f"input, call set_input_size(({height}, {width})), or build with dynamic_img_size=True"
        )
    if min(height, width) < patch_size:
        raise ValueError(f"input is {height}x{width}, smaller than one patch of {patch_size}x{patch_size}")
    return x


class PatchEmbed(nn.Module):
    """Patches to tokens by one convolution; patches overlap where the stride is smaller than they are.

    Args:
        img_size: height and width of the input.
        patch_size: side of a patch.
        stride: step between patches; pixels beyond the last whole patch are not seen.
        in_chans: input channels.
        embed_dim: channels of a token.
        strict_img_size: refuse inputs of another size than `img_size`.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        strict_img_size: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.stride = stride
        self.strict_img_size = strict_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, device=device, dtype=dtype)
        self.set_input_size(img_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return how many patches fit in height and width."""
        return (height - self.patch_size[0]) // self.stride + 1, (
            width - self.patch_size[1]
        ) // self.stride + 1

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Expect inputs of another size.

        Raises:
            ValueError: not even one patch fits.
        """
        if min(img_size) < self.patch_size[0]:
            raise ValueError(f"img_size {img_size} is smaller than one patch of {self.patch_size}")
        self.img_size = img_size
        self.grid_size = self.grid(*img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image (B, in_chans, H, W) as tokens (B, M, C), row by row.

        Raises:
            ValueError: an input of another size or channel count.
        """
        x = check_input(x, self.proj.in_channels, self.img_size, self.patch_size[0], self.strict_img_size)
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Add, norm, mix: the residual stream goes beside what the last mixer gave, and is added to first.

    Args:
        dim: channels.
        drop_path: rate, on the incoming mixer output.
        d_state, d_conv, expand: of the mixer.

    Source: paper section 3.3; models_mamba.py, class Block.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__()
        self.norm = RMSNorm(dim, eps=_NORM_EPS, **dd)
        self.mixer = BidirectionalMamba(dim, d_state=d_state, d_conv=d_conv, expand=expand, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden: what the mixer before gave, or the embedded tokens, (B, L, C).
            residual: the stream before `hidden` is added, float32 or wider; None in the first block.

        Returns:
            This mixer's output and the stream it read.
        """
        if residual is not None:
            hidden = self.drop_path(hidden)
        x, residual = add_rms_norm(hidden, residual, self.norm.weight, _NORM_EPS)
        return self.mixer(x), residual


class VisionMamba(Backbone):
    """Vision Mamba.

    Args:
        img_size: height and width of the input, which must have that size unless `dynamic_img_size`.
        patch_size: side of a patch.
        stride: step between patches; None for patches side by side.
        in_chans: input channels.
        num_classes: classes, 0 for none.
        global_pool: "token" (the class token), "avg" (mean over patches) or "" (none).
        embed_dim: channels C.
        depth: number of blocks.
        d_state, d_conv, expand: of the mixers: scan state size, width of the convolution, scan channels / C.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout of the embedded tokens.
        drop_path_rate: of the last block; see the file's docstring.
        dynamic_img_size: take inputs of any size, the position table resampled at each call.
    """

    pools = ("", "token", "avg")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = self._checked_pool(global_pool)
        self.dynamic_img_size = dynamic_img_size
        stride = patch_size if stride is None else stride

        self.patch_embed = PatchEmbed(
            to_2tuple(img_size), patch_size, stride, in_chans, embed_dim, not dynamic_img_size, **dd
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = [0.0, *calculate_drop_path_rates(drop_path_rate, depth)]
        self.layers = nn.ModuleList(
            [Block(embed_dim, rates[i], d_state, d_conv, expand, **dd) for i in range(depth)]
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.norm_f: nn.Module = RMSNorm(embed_dim, eps=_NORM_EPS, **dd)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=stride, module=f"layers.{i}") for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(**dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do: Mamba's own start, output projections scaled by depth ** -0.5.

        Args:
            needs_reset: reset the submodules first; they have just been built if False.
        """
        if needs_reset:
            for module in self.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            for block in self.layers:  # its linear layers were reset after its steps
                cast(Block, block).mixer.reset_parameters()
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))
        with torch.no_grad():
            for block in self.layers:
                cast(Block, block).mixer.out_proj.weight.mul_(len(self.layers) ** -0.5)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; see `Backbone.reset_classifier`."""
        super().reset_classifier(num_classes, global_pool)
        self._init_head()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        return {"pos_embed", "cls_token", "*.A_log", "*.A_b_log", "*.D", "*.D_b"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return how parameters group into layers."""
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed",
            blocks=[(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        )

    def _resize(self, img_size: tuple[int, int]) -> None:
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        resized = resample_pos_embed(self.pos_embed.detach(), old, self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def _stem(self, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        tokens = self.patch_embed(x)
        grid = self.patch_embed.grid_size
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.patch_embed.grid(x.shape[-2], x.shape[-1])
            pos_embed = resample_pos_embed(pos_embed, self.patch_embed.grid_size, grid)
        middle = tokens.shape[1] // 2
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((tokens[:, :middle], cls_token, tokens[:, middle:]), dim=1)
        return self.pos_drop(tokens + pos_embed), None, grid

    def _step(self, index: int, state: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
        hidden, residual, grid = state
        hidden, residual = self._checkpointed(self.layers[index], hidden, residual)
        return hidden, residual, grid

    def _tap(self, index: int, state: Any, norm: bool) -> Tensor:
        hidden, residual, grid = state
        x = residual + hidden
        x = (self.norm_f(x) if norm else x).type_as(hidden)
        return self._patches(x).transpose(1, 2).unflatten(2, grid).contiguous()

    def _final(self, state: Any) -> Tensor:
        hidden, residual, _ = state
        return self.norm_f(residual + self.drop_path(hidden)).type_as(hidden)

    def _patches(self, x: Tensor) -> Tensor:
        """Return the tokens (B, L, C) without the class token."""
        middle = x.shape[1] // 2
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "avg":
            return self._patches(x).mean(dim=1)
        return x[:, (x.shape[1] - 1) // 2]

    def _truncate(self, count: int) -> None:
        self.layers = self.layers[:count]

    def _drop_final_norm(self) -> None:
        self.norm_f = nn.Identity()


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resample the position table to the model's grid; the names are the authors' own.

    Raises:
        ValueError: a table of another size that is not a square grid and a class row.
    """
    model = cast(VisionMamba, model)
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or pos_embed.ndim != 3 or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return state_dict
    rows = pos_embed.shape[1] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise ValueError(
            f"pos_embed has {rows + 1} rows, {model.pos_embed.shape[1]} are needed, and {rows} patches are "
            "no square grid to resample: build the model with the file's img_size and call set_input_size"
        )
    pos_embed = resample_pos_embed(pos_embed, (side, side), model.patch_embed.grid_size)
    return {**state_dict, "pos_embed": pos_embed}


def _cfg(size: str, filename: str) -> dict[str, Any]:
    return dict(
        hf_hub_id=f"hustvl/Vim-{size}-midclstok",
        hf_hub_filename=filename,
        num_classes=1000,
        input_size=(3, 224, 224),
        fixed_input_size=True,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
        origin_url="https://github.com/hustvl/Vim",
        paper_ids="arXiv:2401.09417",
    )


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg("tiny", "vim_t_midclstok_76p1acc.pth"),
        "vim_small_patch16_224.in1k": _cfg("small", "vim_s_midclstok_80p5acc.pth"),
        "vim_base_patch16_224.in1k": _cfg("base", "vim_b_midclstok_81p9acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _cfg("tiny", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _cfg("small", "vim_s_midclstok_ft_81p6acc.pth"),
    }
)

_README = "authors' README (top-1); parameters counted from their code; no FLOPs published"

FAMILY = register_family(
    Family(
        name="vim",
        categories=("scan",),
        paper="Vision Mamba, ICML 2024, arXiv 2401.09417",
        code="https://github.com/hustvl/Vim/tree/dd0358ad1e42701f22afbefa0717cc8825cf9f45",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
        models={
            "vim_tiny_patch16_224": Published(7_148_008, None, 76.1, _README),
            "vim_small_patch16_224": Published(25_796_584, None, 80.5, _README),
            "vim_base_patch16_224": Published(97_598_440, None, 81.9, _README),
            "vim_tiny_patch16_stride8_224": Published(7_250_344, None, 78.3, _README),
            "vim_small_patch16_stride8_224": Published(26_001_256, None, 81.6, _README),
        },
        tags={
            "vim_tiny_patch16_224.in1k": Tag(top1=76.1),
            "vim_small_patch16_224.in1k": Tag(top1=80.5),
            "vim_base_patch16_224.in1k": Tag(top1=81.9),
            "vim_tiny_patch16_stride8_224.in1k": Tag(top1=78.3),
            "vim_small_patch16_stride8_224.in1k": Tag(top1=81.6),
        },
    )
)


def _vim(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> VisionMamba:
    model = build(
        VisionMamba,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        defaults=defaults,
        feature_taps=(5, 11, 17, 23),
        **kwargs,
    )
    return cast(VisionMamba, model)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 192 channels, 7.1 M parameters, 197 tokens."""
    return _vim("vim_tiny_patch16_224", pretrained, kwargs, embed_dim=192)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 384 channels, 25.8 M parameters, 197 tokens."""
    return _vim("vim_small_patch16_224", pretrained, kwargs, embed_dim=384)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 768 channels, 97.6 M parameters, 197 tokens."""
    return _vim("vim_base_patch16_224", pretrained, kwargs, embed_dim=768)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti with overlapping patches, stride 8: 7.3 M parameters, 730 tokens."""
    return _vim("vim_tiny_patch16_stride8_224", pretrained, kwargs, embed_dim=192, stride=8)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S with overlapping patches, stride 8: 26.0 M parameters, 730 tokens."""
    return _vim("vim_small_patch16_stride8_224", pretrained, kwargs, embed_dim=384, stride=8)
