"""Pictures that show what a model does to a photograph, as data URIs of JPEG files.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.layers.attention import HiLo
from vitzoo.layers.token import patch_mask

SIDE = 448  # pixels of a picture; twice the usual input, so that it stays sharp on dense screens
# dark blue over teal to yellow, evenly growing in lightness
COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)


@dataclass(frozen=True)
class Picture:
    """A picture: a data URI, what it shows for those who do not see it, and the line below it."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Figure:
    """A group of pictures of one model and one kind, one row a photograph."""

    kind: str
    model: str
    rows: list[list[Picture]] = field(default_factory=list)


def data_uri(image: Any, quality: int = 82) -> str:
    """Return a PIL image as the data URI of a JPEG file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figures_of(model: nn.Module, x: Tensor, row: dict[str, Any], photos: dict[str, Any]) -> list[Figure]:
    """Return the figures that a model's kind has: kept patches, or the branches of HiLo.

    Args:
        model: in evaluation mode.
        x: the photographs as the model takes them, (B, C, H, W).
        row: the model's figures; "kept_patches" is added where there are any.
        photos: file name -> PIL image.
    """
    figures = []
    if hasattr(model, "set_keep_rate"):
        figures.append(_kept_patches(model, x, row, photos))
    if any(isinstance(module, HiLo) and module.h_heads and module.l_heads for module in model.modules()):
        figures.append(_branches(model, row["model"], photos))
    return figures


def _seen(model: nn.Module, photo: Any, side: int = SIDE) -> np.ndarray:
    """Return the part of a photograph that the model sees, (side, side, 3) in 0 .. 1."""
    config = resolve_data_config({}, model=model)
    config |= {"input_size": (3, side, side), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return create_transform(**config)(photo).clamp(0, 1).permute(1, 2, 0).numpy()


def _image(values: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _stem(photo: str) -> str:
    return photo.rsplit(".", 1)[0]


def _kept_patches(model: Any, x: Tensor, row: dict[str, Any], photos: dict[str, Any]) -> Figure:
    with torch.inference_mode():
        _, kept = model.forward_features(x, return_kept=True)
    grid = model.patch_embed.grid_size
    total = grid[0] * grid[1]
    numbers = [number for number, block in enumerate(model.blocks) if block.keep_rate < 1.0]
    masks = [patch_mask(patches, grid) for patches in kept]  # (B, H, W) each
    row["kept_patches"] = {
        photo: [int(mask[index].sum()) for mask in masks] for index, photo in enumerate(photos)
    }
    figure = Figure("kept patches", row["model"])
    for index, (name, photo) in enumerate(photos.items()):
        seen = _seen(model, photo)
        pictures = [Picture(data_uri(_image(seen)), f"The photograph {_stem(name)}", f"all {total} patches")]
        for number, mask in zip(numbers, masks, strict=True):
            count = int(mask[index].sum())
            alt = f"{_stem(name)}: {total - count} of {total} patches are faded, dropped by block {number}"
            picture = data_uri(_image(_faded(seen, mask[index].numpy())))
            pictures.append(Picture(picture, alt, f"after block {number}: {count} patches"))
        figure.rows.append(pictures)
    return figure


def _faded(seen: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fade the patches (H, W) that are not in the mask towards grey, and draw the grid's lines."""
    cell = seen.shape[0] // mask.shape[0], seen.shape[1] // mask.shape[1]
    keep = mask.repeat(cell[0], axis=0).repeat(cell[1], axis=1)[..., None]
    grey = seen.mean(-1, keepdims=True) * 0.18 + 0.72
    out = np.where(keep, seen, grey)
    out[:: cell[0]] = out[:: cell[0]] * 0.6 + 0.4
    out[:, :: cell[1]] = out[:, :: cell[1]] * 0.6 + 0.4
    return out


def _branches(model: nn.Module, name: str, photos: dict[str, Any]) -> Figure:
    """Show where the Hi-Fi and the Lo-Fi branch of one block respond, at twice the usual resolution."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HiLo) and m.h_heads and m.l_heads}
    label = list(layers)[len(layers) // 2]
    layer = layers[label]
    figure = Figure("HiLo branches", name)
    config = resolve_data_config({}, model=model) | {"input_size": (3, SIDE, SIDE)}
    transform = create_transform(**config)
    for photo_name, photo in photos.items():
        maps = _branch_maps(model, layer, transform(photo)[None])
        seen = _seen(model, photo)
        stem = _stem(photo_name)
        pictures = [Picture(data_uri(_image(seen)), f"The photograph {stem}", f"{SIDE} x {SIDE} pixels")]
        for branch, what, response in zip(("Hi-Fi", "Lo-Fi"), ("high", "low"), maps, strict=True):
            heads = layer.h_heads if branch == "Hi-Fi" else layer.l_heads
            alt = f"{stem} tinted by the strength of the {what}-frequency branch of {label}"
            caption = f"{branch}, {what} frequencies: {heads} heads"
            pictures.append(Picture(data_uri(_image(_tinted(seen, response))), alt, caption))
        figure.rows.append(pictures)
    return figure


def _branch_maps(model: nn.Module, layer: HiLo, x: Tensor) -> list[Tensor]:
    """Return what either branch adds to its mean over the map, its norm over channels, (H, W)."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, tuple[int, int]]) -> None:
        inputs.append(args[0].unflatten(1, args[1]))

    handle = layer.register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            model(x)
            branches = [layer.hifi(inputs[0]), layer.lofi(inputs[0])]  # (1, H, W, C)
    finally:
        handle.remove()
    return [(b - b.mean((1, 2), keepdim=True)).norm(dim=-1)[0] for b in branches]


def _tinted(seen: np.ndarray, response: Tensor) -> np.ndarray:
    """Lay a map (H, W) over a photograph in colours that run from its 2nd to its 98th percentile."""
    large = F.interpolate(response[None, None], seen.shape[:2], mode="bicubic", align_corners=False)[0, 0]
    values = large.numpy()
    low, high = np.percentile(values, (2, 98))
    level = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1) / 255
    return 0.3 * seen.mean(-1, keepdims=True) + 0.7 * colour
