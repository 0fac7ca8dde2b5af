"""The demo's INT8 files: each model quantized on crops of the photographs, and what the gate found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision import transforms

from vitzoo.deploy import GateError, Thresholds, export_quantized, quantize, this_machine
from vitzoo.export.quantized import for_target
from vitzoo.quantization.config import load_recipe

RECIPE = "w8a8"  # "auto" measures every layer, minutes a model
CALIBRATED, HELD_BACK = 16, 8
BATCH = 8
SEED = 0
THRESHOLDS = Thresholds()


def crops(model: nn.Module, photos: Iterable[Any], count: int, seed: int = SEED) -> Tensor:
    """Return random crops of PIL images in turn as the model takes them, (count, C, H, W)."""
    config = resolve_data_config({}, model=model)
    prepare = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["input_size"][1:], scale=(0.1, 1.0)),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    images = [*photos]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([prepare(images[i % len(images)]) for i in range(count)])


def write_int8(
    model: nn.Module,
    photos: Iterable[Any],
    path: Path,
    threads: int | None,
    tell: Callable[[str], None],
    attention: float,
    float_file: Path | None = None,
) -> dict[str, Any]:
    """Quantize a model and write its INT8 file, if the gate lets it pass.

    Args:
        model: on the CPU, in evaluation mode.
        photos: PIL images that crops are taken of.
        path: the file, `*.onnx`.
        threads: of ONNX Runtime, PyTorch's number if None.
        tell: told the present step.
        attention: share of the model's multiply-accumulates in attention's products, which the recipe leaves in float;
            they are quantized too where they alone would miss the gate.
        float_file: the model's float ONNX file, if it was exported before.

    Returns:
        The gate's figures, with `file`, what was written, `refused`, why it is the float file, else None, and
        `products`, whether attention's products are quantized too.
    """
    images = crops(model, photos, CALIBRATED + HELD_BACK)
    target = this_machine()
    tell("quantize")
    products = attention > 1 - THRESHOLDS.coverage
    recipe = dataclasses.replace(for_target(load_recipe(RECIPE), target), products=products)
    quantized = quantize(model, recipe, images[:CALIBRATED].split(BATCH), target=target)
    refused = None
    try:
        gate = export_quantized(
            model,
            quantized,
            path,
            images[CALIBRATED:],
            target,
            THRESHOLDS,
            threads,
            BATCH,
            progress=tell,
            float_file=float_file,
        )
    except GateError as error:
        gate, path, refused = error.gate, error.float_path, str(error)
    found = {"recipe": RECIPE, "products": products, "target": target, **dataclasses.asdict(gate)}
    return {**found, "file": path.name, "size_bytes": path.stat().st_size, "refused": refused}
