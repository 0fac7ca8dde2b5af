"""LITv2: HiLo attention in the two deep stages, none in the shallow ones, deformable merging between them.

Paper: Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213.
Code: https://github.com/ziplab/LITv2 at 7501c8662991cad6db780b61fac0886b56a76588 (Apache-2.0),
classification/models/litv2.py and segmentation/mmseg/models/backbones/litv2.py.

The authors keep a classifier for one square size and a dense-prediction backbone for any size. Both are here:
the image is zero-padded right and bottom to a multiple of the patch, merging drops an odd last row or column,
HiLo pads to its window. On square multiples of 32 nothing of this happens and the classifier's numbers come
out. Where paper and code differ the code is followed: the first two stages have no attention at all, stage 4
has window 1, i.e. plain attention whatever alpha is, and the classifier too merges by deformable convolution.

Maps are channels-last between layers, (B, H, W, C): linear layers and norms take them as they are,
convolutions as a view.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, register_notrace_module, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.layers.attention import HiLo
from vitzoo.layers.conv import DeformConv2d
from vitzoo.models._base import Backbone
from vitzoo.models._builder import build
from vitzoo.registry import Family, Published, Tag, register_family

_logger = logging.getLogger(__name__)

_PATCH = 4
_RELEASES = "https://github.com/ziplab/LITv2/releases/download"


def _nchw(x: Tensor) -> Tensor:
    """View a map (B, H, W, C) as (B, C, H, W), channels last in memory."""
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Embed 4x4 patches and normalise them; an image that is no multiple of 4 gets zeros right and bottom."""

    def __init__(self, in_chans: int, embed_dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, _PATCH, stride=_PATCH, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H/4, W/4, C), rounded up, of an image (B, in_chans, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(f"input has shape {tuple(x.shape)}, expected (B, {self.proj.in_channels}, H, W)")
        below, right = -x.shape[2] % _PATCH, -x.shape[3] % _PATCH
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.norm(_nhwc(self.proj(x)))


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution of a map (B, H, W, C)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return _nhwc(self.dwconv(_nchw(x)))


class DWMlp(nn.Module):
    """MLP with a depthwise convolution between its first layer and the activation.

    Source: paper section 3.4 (ConvFFN).
    """

    def __init__(self, dim: int, hidden_dim: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = DepthwiseConv(hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class ConvBlock(nn.Module):
    """Pre-norm block of the first stages: the MLP alone. Its norm is called norm2, as published."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DWMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HiLoBlock(ConvBlock):
    """Pre-norm block of the last stages: HiLo attention, then the MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        qkv_bias: bool,
        mlp_ratio: float,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop_path, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = HiLo(dim, num_heads, window_size, alpha, qkv_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        size = (x.shape[1], x.shape[2])
        x = x + self.drop_path(self.attn(self.norm1(x).flatten(1, 2), size).unflatten(1, size))
        return super().forward(x)


class DeformableMerge(nn.Module):
    """Deformable token merging: a 2x2 deformable convolution of stride 2, BatchNorm, GELU.

    An odd last row or column is dropped.

    Source: Pan et al., Less is More: Pay Less Attention in Vision Transformers, arXiv 2105.14217,
        section 3.3.
    """

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.dconv = DeformConv2d(dim, out_dim, 2, **dd)
        self.norm_layer = nn.BatchNorm2d(out_dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H // 2, W // 2, out_dim)."""
        x = self.dconv(_nchw(x))
        # The copy to channels last is needed anyway; it stands before the norm because torch's CPU BatchNorm
        # backward is wrong for a single NCHW image whose gradient arrives channels last.
        x = x.contiguous(memory_format=torch.channels_last)
        return _nhwc(self.act(self.norm_layer(x)))


class Stage(nn.Module):
    """Blocks of one resolution, and the merging to the next, which the model calls on its own."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape; the merging is not part of it."""
        for block in self.blocks:
            x = block(x)
        return x


class LITv2(Backbone):
    """LITv2, classifier and dense-prediction backbone in one.

    Any image of at least 29x29 pixels is accepted: three mergings need a map of 8x8 patches.

    Args:
        img_size: size the model is meant for; no weight depends on it.
        in_chans, num_classes, global_pool: as in timm; pooling "avg" or "".
        embed_dim: channels of the first stage, doubled by each merging.
        depths: blocks of each stage.
        num_heads: attention heads of each stage, Hi-Fi and Lo-Fi together.
        window_sizes: HiLo window of each stage; 0 for a stage without attention, 1 for plain attention.
        alpha: share of Lo-Fi heads, in [0, 1].
        mlp_ratio, qkv_bias: as in timm.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly from block to block.
        feature_norm: create norm0, norm1, ... and hand out feature maps normalised by them, as the authors'
            segmentation code does; or the numbers of the maps to normalise, (1, 2, 3) in their detection
            code. Without it maps are handed out as they are. The classifier's path does not change.

    Raises:
        ValueError: lists of different lengths, a negative window, alpha outside [0, 1], an unknown pooling, a
            map that does not exist.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norm: bool | Sequence[int] = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_stages(depths, num_heads, window_sizes)
        taps = range(len(depths))
        self.img_size = to_2tuple(img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = self._checked_pool(global_pool)
        self.alpha = alpha
        self.window_sizes = tuple(window_sizes)
        self.feature_norm = _feature_norms(feature_norm, len(depths))
        dims = [embed_dim * 2**i for i in taps]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": _PATCH * 2**i, "module": f"layers.{i}"}
            for i, dim in enumerate(dims)
        ]
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))

        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        stages, start = [], 0
        for i, (dim, depth, heads, window) in enumerate(
            zip(dims, depths, num_heads, window_sizes, strict=True)
        ):
            blocks = [
                HiLoBlock(dim, heads, window, alpha, qkv_bias, mlp_ratio, rate, **dd)
                if window
                else ConvBlock(dim, mlp_ratio, rate, **dd)
                for rate in rates[start : start + depth]
            ]
            start += depth
            last = i == len(depths) - 1
            stages.append(Stage(blocks, nn.Identity() if last else DeformableMerge(dim, 2 * dim, **dd)))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(**dd)
        for i in self.feature_norm:
            setattr(self, f"norm{i}", nn.LayerNorm(dims[i], **dd))
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do.

        Args:
            needs_reset: first give every module PyTorch's own initialisation (after `to_empty`, for
                instance).
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and reset is not None:
                reset()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
            elif isinstance(module, DepthwiseConv):
                nn.init.normal_(module.dwconv.weight, std=math.sqrt(2 / 9))
                nn.init.zeros_(cast(Tensor, module.dwconv.bias))
            elif isinstance(module, DeformConv2d):
                module.reset_parameters()

    def _make_head(self, device: Any = None, dtype: Any = None) -> nn.Module:
        head = super()._make_head(device, dtype)
        if isinstance(head, nn.Linear):
            _init_linear(head)
        return head

    def no_weight_decay(self) -> set[str]:
        """Return no name: the authors exempt 1-d parameters only, as timm's optimizers do by themselves."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups; a merging closes the stage before it."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.downsample", (99998,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def _resize(self, img_size: tuple[int, int]) -> None:
        self.img_size = img_size

    def _stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def _step(self, index: int, state: Tensor) -> Tensor:
        if index:
            state = cast(Stage, self.layers[index - 1]).downsample(state)
        if not self.grad_checkpointing:
            return self.layers[index](state)
        for block in cast(Stage, self.layers[index]).blocks:
            state = self._checkpointed(block, state)
        return state

    def _tap(self, index: int, state: Tensor, norm: bool) -> Tensor:
        if self.feature_norm:
            state = getattr(self, f"norm{index}")(state) if index in self.feature_norm else state
        elif norm and index == len(self.layers) - 1:
            state = self.norm(state)
        return _nchw(state)

    def _final(self, state: Tensor) -> Tensor:
        return _nchw(self.norm(state))

    def _pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))

    def _truncate(self, count: int) -> None:
        self.layers = self.layers[:count]
        cast(Stage, self.layers[-1]).downsample = nn.Identity()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the modules that the taps asked for do not need, feature norms included; see `Backbone`."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        for i in set(self.feature_norm) - set(take):
            delattr(self, f"norm{i}")
        self.feature_norm = tuple(i for i in self.feature_norm if i in take)
        return take


def _init_linear(module: nn.Linear) -> None:
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_stages(depths: Sequence[int], num_heads: Sequence[int], window_sizes: Sequence[int]) -> None:
    if not len(depths) == len(num_heads) == len(window_sizes):
        raise ValueError(
            f"depths {tuple(depths)}, num_heads {tuple(num_heads)} and window_sizes {tuple(window_sizes)} "
            "must have one entry a stage each"
        )
    if min(window_sizes) < 0:
        raise ValueError(
            f"window_sizes {tuple(window_sizes)} has a negative entry; 0 is a stage without attention, 1 "
            "plain attention"
        )


def _feature_norms(feature_norm: bool | Sequence[int], stages: int) -> tuple[int, ...]:
    if isinstance(feature_norm, bool):
        return tuple(range(stages)) if feature_norm else ()
    taps = tuple(feature_norm)
    if not set(taps) <= set(range(stages)):
        raise ValueError(f"feature_norm {taps} names maps that are not in 0 .. {stages - 1}")
    return taps


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: nn.Module, features_only: bool = False
) -> dict[str, Tensor]:
    """Adapt a file of the authors, whose names are ours, to the parts that the model has.

    Classification files have no norms of feature maps: a model with `feature_norm` keeps its own, as the
    authors' dense-prediction code does when it starts from ImageNet. Dense-prediction files have neither the
    final norm nor a classifier, which `features_only` removes after loading. Anything else must match.

    Args:
        state_dict: weights by name.
        model: the model to load into.
        features_only: the classifier's norm and layer may be absent.

    Returns:
        Weights by name.

    Raises:
        ValueError: the file has norms of other feature maps than the model.
    """
    out = dict(state_dict)
    own = model.state_dict()
    in_file = tuple(i for i in range(len(own)) if f"norm{i}.weight" in out)
    in_model = cast(LITv2, model).feature_norm
    # a pruned model, as features_only leaves it, has no final norm to fill either
    if in_file and (in_file != in_model or not (features_only or "norm.weight" not in own)):
        raise ValueError(
            f"the file is a dense-prediction backbone, with norms of the feature maps {in_file} and no "
            f"classifier: pass features_only=True, feature_norm={in_file} (the model has {in_model or None})"
        )
    absent = []
    if in_model and not in_file:
        absent += [f"norm{i}." for i in in_model]
        _logger.warning("a classification file has no norms of feature maps; they start untrained")
    if features_only:
        absent += ["norm.", "head."]
    for name, value in own.items():
        # files saved without their counters load too: BatchNorm does not read the number when it has a
        # momentum
        if name.startswith(tuple(absent)) or name.endswith(".num_batches_tracked"):
            out.setdefault(name, value)
    return out


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{file}",
        "origin_url": "https://github.com/ziplab/LITv2",
        "license": "apache-2.0",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


# LITv2-S trained with other shares of Lo-Fi heads: alpha -> (GMACs, top-1), paper figure 4 and the authors'
# README.
_ALPHAS = {
    0: (3.97, 81.16),
    0.2: (3.88, 81.89),
    0.4: (3.82, 81.81),
    0.5: (3.77, 81.88),
    0.7: (3.74, 81.94),
    0.9: (3.73, 82.03),
    1: (3.70, 81.89),
}
_LETTERS = {"litv2_small": "s", "litv2_medium": "m", "litv2_base": "b"}
_DENSE = {"input_size": (3, 512, 512), "pool_size": (16, 16), "crop_pct": 1.0}


def _dense_files() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return "model.tag" -> (file, constructor arguments) of the segmentation and detection files."""
    files: dict[str, tuple[str, dict[str, Any]]] = {}
    for model, letter in _LETTERS.items():
        whole = {"feature_norm": (0, 1, 2, 3)}
        files[f"{model}.fpn_ade20k"] = (f"v1.0/litv2_{letter}_fpn_r50_512x512_80k_ade20k.pth", whole)
        for detector in ("retinanet", "mask_rcnn"):
            # their detection backbone hands out the first map without a norm
            args: dict[str, Any] = {"feature_norm": (1, 2, 3)}
            file = f"v1.0/{detector}_litv2_{letter}_fpn_1x_coco"
            files[f"{model}.{detector}_coco"] = (f"{file}.pth", args)
            args = {**args, "window_sizes": (0, 0, 4, 1)}
            files[f"{model}.{detector}_ws4_coco"] = (f"{file}_ws_4.pth", args)
    return files


default_cfgs = generate_default_cfgs(
    {
        "litv2_small.in1k": _cfg("v1.0/litv2_s.pth"),
        "litv2_medium.in1k": _cfg("v1.0/litv2_m.pth"),
        "litv2_base.in1k": _cfg("v1.0/litv2_b.pth"),
        "litv2_base_384.in1k": _cfg(
            "v1.0/litv2_b_384.pth",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
            crop_mode="squash",
        ),
        **{f"litv2_small.alpha{alpha}_in1k": _cfg(f"v1.1/alpha_{alpha}.pth") for alpha in _ALPHAS},
        **{tag: _cfg(file, **_DENSE) for tag, (file, _) in _dense_files().items()},
    }
)

FAMILY = register_family(
    Family(
        name="litv2",
        categories=("hierarchical", "hilo"),
        paper="Pan, Cai, Zhuang, Fast Vision Transformers with HiLo Attention, NeurIPS 2022, "
        "arXiv 2205.13213",
        code="https://github.com/ziplab/LITv2/tree/7501c8662991cad6db780b61fac0886b56a76588",
        code_license="Apache-2.0",
        weights_license="Apache-2.0, released with the code; none is stated for them separately",
        models={
            "litv2_small": Published(27_844_000, 3.7, 82.0, "arXiv 2205.13213, table 1"),
            "litv2_medium": Published(48_830_368, 7.5, 83.3, "arXiv 2205.13213, table 1"),
            "litv2_base": Published(86_520_704, 13.2, 83.6, "arXiv 2205.13213, table 1"),
            "litv2_base_384": Published(86_520_704, 39.7, 84.7, "arXiv 2205.13213, table 1"),
        },
        tags={
            **{
                f"litv2_small.alpha{alpha}_in1k": Tag(args={"alpha": alpha}, gmacs=gmacs, top1=top1)
                for alpha, (gmacs, top1) in _ALPHAS.items()
            },
            **{tag: Tag(args=args) for tag, (_, args) in _dense_files().items()},
        },
    )
)


def _create_litv2(variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any) -> LITv2:
    filter_fn = partial(checkpoint_filter_fn, features_only=bool(kwargs.get("features_only")))
    return cast(LITv2, build(LITv2, variant, pretrained, filter_fn=filter_fn, defaults=defaults, **kwargs))


@register_model
def litv2_small(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S."""
    args = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create_litv2("litv2_small", pretrained, args, **kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M."""
    args = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _create_litv2("litv2_medium", pretrained, args, **kwargs)


@register_model
def litv2_base(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B."""
    args = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create_litv2("litv2_base", pretrained, args, **kwargs)


@register_model
def litv2_base_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B fine-tuned at 384."""
    args = {"img_size": 384, "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _create_litv2("litv2_base_384", pretrained, args, **kwargs)
