"""Calibration images from a folder, as the model takes them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn

LEAST = 16
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Calibration:
    """Images for `quantize`, and others to check its result on.

    Attributes:
        batches: to calibrate on, each (B, C, H, W).
        held_back: to compare on, (B, C, H, W); none of them was calibrated on.
        used: files read, in order.
        skipped: files that could not be read.
    """

    batches: tuple[Tensor, ...]
    held_back: Tensor
    used: tuple[Path, ...]
    skipped: tuple[Path, ...]


def load_folder(
    folder: str | Path,
    model: nn.Module,
    input_size: Sequence[int],
    count: int = 64,
    held_back: int = 16,
    least: int = LEAST,
    batch_size: int = 8,
) -> Calibration:
    """Read images below a folder, prepared as the model's own configuration says.

    Every n-th file is taken, in the order of their names, so that each class of a sorted folder is seen.

    Args:
        folder: searched with its subfolders.
        model: its `pretrained_cfg` gives mean, deviation, crop and interpolation.
        input_size: (C, H, W).
        count: images to calibrate on, at most.
        held_back: further images, to compare on.
        least: images to calibrate on, at least.
        batch_size: images a batch.

    Raises:
        OSError: the folder does not exist.
        ValueError: fewer images can be read than `least` and one to hold back.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder of images")
    endings = set(get_img_extensions(as_set=True))
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in endings and p.is_file())
    channels, height, width = input_size
    config = {**resolve_model_data_config(model), "input_size": (channels, height, width)}
    transform = create_transform(**config, is_training=False)
    wanted = count + held_back
    step = max(1, len(paths) // wanted)
    order = [paths[i] for first in range(step) for i in range(first, len(paths), step)]
    used: list[Path] = []
    skipped: list[Path] = []
    images: list[Tensor] = []
    for path in order:
        if len(images) == wanted:
            break
        try:
            images.append(transform(read_image(path, channels)))
        except UNREADABLE as error:
            skipped.append(path)
            warnings.warn(f"{path} is skipped: {type(error).__name__}: {error}", stacklevel=2)
        else:
            used.append(path)
    if len(images) < least + 1:
        raise ValueError(
            f"{root} has {len(images)} images that can be read ({len(skipped)} skipped), and calibration needs "
            f"{least} and one to compare on"
        )
    kept = min(held_back, len(images) - least)
    places = range(0, len(images), len(images) // kept)[:kept]  # spread over the folder as the others are
    checked = torch.stack([images[i] for i in places])
    fitted = torch.stack([image for i, image in enumerate(images) if i not in places])
    return Calibration(fitted.split(batch_size), checked, tuple(used), tuple(skipped))


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Return an image file in grey for one channel, in RGB for more; `UNREADABLE` is what this may raise."""
    with Image.open(path) as image:
        return image.convert("L" if channels == 1 else "RGB")
