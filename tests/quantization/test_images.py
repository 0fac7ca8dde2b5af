"""Calibration images: prepared as the model says, corrupted files counted, too few refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitzoo.quantization.images import load_folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", depth=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(24):
        place = tmp_path / f"class{i // 8}"
        place.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), i, np.uint8)).save(place / f"{i:02d}.png")
    return tmp_path


def test_images_are_normalized_and_split(model: nn.Module, folder: Path) -> None:
    found = load_folder(folder, model, (3, 32, 32), count=18, held_back=4)
    fitted = torch.cat(found.batches)
    assert fitted.shape == (18, 3, 32, 32)
    assert found.held_back.shape == (4, 3, 32, 32)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]  # type: ignore[index]
    every = torch.cat([fitted, found.held_back])
    levels = every[:, 0].mean((1, 2)) * std[0] + mean[0]
    assert sorted((levels * 255).round().int().tolist()) == sorted({*(levels * 255).round().int().tolist()})
    assert (levels * 255 - (levels * 255).round()).abs().max() < 1e-3
    assert len({*found.used}) == 22


def test_a_sorted_folder_is_sampled_evenly(model: nn.Module, folder: Path) -> None:
    found = load_folder(folder, model, (3, 32, 32), count=6, held_back=2, least=2)
    assert {path.parent.name for path in found.used} == {"class0", "class1", "class2"}


def test_corrupted_files_are_skipped_and_counted(model: nn.Module, folder: Path) -> None:
    (folder / "class0" / "00.png").write_bytes(b"not an image")
    cut = (folder / "class0" / "01.png").read_bytes()
    (folder / "class0" / "01.png").write_bytes(cut[: len(cut) // 2])
    with pytest.warns(UserWarning, match=r"0[01]\.png is skipped"):
        found = load_folder(folder, model, (3, 32, 32), count=30, held_back=4)
    assert {path.name for path in found.skipped} == {"00.png", "01.png"}
    assert len(found.used) == 22


def test_too_few_images_are_an_error_with_the_counts(model: nn.Module, folder: Path) -> None:
    for path in sorted(folder.rglob("*.png"))[10:]:
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(
            ValueError, match=r"has 10 images that can be read \(14 skipped\), and calibration needs 16"
        ),
    ):
        load_folder(folder, model, (3, 32, 32))
    with pytest.raises(NotADirectoryError, match="is not a folder of images"):
        load_folder(folder / "none", model, (3, 32, 32))
