"""Labelled images from a folder with one subfolder a class, as a model takes them and in its order of classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor
from torchvision.datasets import ImageFolder

from vitzoo.quantization.images import UNREADABLE, read_image


class LabelledFolder(ImageFolder):
    """torchvision's ImageFolder with the model's class indices; an image that cannot be read is told, not raised.

    Args:
        folder: one subfolder a class, images below it at any depth.
        num_classes: of the model.
        config: of the images, as `timm.data.resolve_data_config` gives it.
        label_names: the model's names of its classes, if it has them.
        class_map: text file with the name of a class folder a line, in the model's order.

    Raises:
        OSError: the folder or the class map does not exist.
        ValueError: no class folders, one without images, or folders that do not say which class they are.
    """

    def __init__(
        self,
        folder: str | Path,
        num_classes: int,
        config: Mapping[str, Any],
        label_names: Sequence[str] | None = None,
        class_map: str | Path | None = None,
    ) -> None:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"{folder} is not a folder with one subfolder a class")
        self._number = functools.partial(
            _class_indices, num_classes=num_classes, label_names=label_names, class_map=class_map
        )
        endings = get_img_extensions(as_set=True)
        super().__init__(
            str(folder),
            create_transform(**config, is_training=False),
            loader=functools.partial(read_image, channels=config["input_size"][0]),
            is_valid_file=lambda path: Path(path).suffix.lower() in endings,
            allow_empty=True,
        )
        filled = {target for _, target in self.samples}
        empty = [name for name, target in self.class_to_idx.items() if target not in filled]
        if empty:
            raise ValueError(
                f"{folder} has class folders without images: {_some(empty)}; fill or remove them "
                f"(endings looked for: {', '.join(sorted(endings))})"
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Return the class folders, in timm's order, and the model's index of each."""
        names = sorted((p.name for p in Path(directory).iterdir() if p.is_dir()), key=natural_key)
        if not names:
            raise ValueError(f"{directory} has no class folders; images lie in one subfolder a class")
        return names, self._number(names, directory)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int, str]:
        """Return the image, or in words why it cannot be read; its class; and its path."""
        path, target = self.samples[index]
        try:
            return self.transform(self.loader(path)), target, path
        except UNREADABLE as error:
            return f"{type(error).__name__}: {error}", target, path


def collate(
    samples: Sequence[tuple[Tensor | str, int, str]],
) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
    """Return the images of a batch, None if there are none; their classes; and (path, reason) of those not read."""
    images = [(image, target) for image, target, _ in samples if isinstance(image, Tensor)]
    skipped = [(path, reason) for reason, _, path in samples if isinstance(reason, str)]
    stacked = torch.stack([image for image, _ in images]) if images else None
    return stacked, torch.tensor([target for _, target in images], dtype=torch.long), skipped


def _class_indices(
    names: list[str],
    folder: str,
    num_classes: int,
    label_names: Sequence[str] | None,
    class_map: str | Path | None,
) -> dict[str, int]:
    """Return the model's index of each class folder, by the first list of names that knows any of them."""
    for source, known in _sources(num_classes, label_names, class_map):
        unknown = [name for name in names if name not in known]
        if class_map is None and len(unknown) == len(names):
            continue
        if unknown:
            raise ValueError(f"{folder} has class folders that {source} do not name: {_some(unknown)}")
        beyond = [name for name in names if not known[name] < num_classes]
        if beyond:
            raise ValueError(f"{source} number {_some(beyond)} beyond the model's {num_classes} classes")
        return {name: known[name] for name in names}
    if len(names) != num_classes:
        raise ValueError(
            f"{folder} has {len(names)} class folders and the model {num_classes} classes: say which they are with a "
            "class map, a .txt file that names the folder of each class, one a line"
        )
    return {name: index for index, name in enumerate(names)}


def _sources(
    num_classes: int, label_names: Sequence[str] | None, class_map: str | Path | None
) -> list[tuple[str, dict[str, int]]]:
    """Return (what it is, name -> index) of what may number the folders."""
    if class_map is not None:
        path = Path(class_map)
        if path.suffix != ".txt":
            raise ValueError(f"class map {path} is not a .txt file with one class folder a line")
        if not path.is_file():
            raise FileNotFoundError(f"there is no class map {path}")
        return [(f"the lines of {path}", load_class_map(str(path)))]
    found = []
    if label_names:
        found.append(("the model's labels", {name: i for i, name in enumerate(label_names)}))
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset:
        synsets = ImageNetInfo(subset).label_names()
        found.append((f"the synsets of {subset}", {name: i for i, name in enumerate(synsets)}))
    return found


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
