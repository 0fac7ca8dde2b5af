"""What is known of an exported model without running it: the JSON file beside every export, and what is in archives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from vitzoo._version import __version__

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def notes(
    model: nn.Module, input_size: Sequence[int], axes: Mapping[int, str], outputs: Sequence[str]
) -> dict[str, Any]:
    """Return what a file is and how images are prepared for it.

    Args:
        model: the float model, or one that carries its `pretrained_cfg`.
        input_size: (C, H, W) in pixels.
        axes: axis -> name of the input's dynamic ones.
        outputs: names of the outputs.
    """
    data = resolve_model_data_config(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    shape = [axes.get(axis, size) for axis, size in enumerate((0, *input_size))]
    return {
        "architecture": cfg.get("architecture") or type(model).__name__,
        "num_classes": getattr(model, "num_classes", None),
        "label_names": cfg.get("label_names"),
        "input": {"name": "input", "shape": shape, "dtype": "float32"},
        "input_size": list(input_size),
        "output": {"name": outputs[0]},
        "outputs": list(outputs),
        "preprocessing": {key: data[key] for key in PREPROCESSING},
        "vitzoo": __version__,
        "torch": torch.__version__.partition("+")[0],
    }


def hashes(file: Path, others: Iterable[Path] = ()) -> dict[str, Any]:
    """Return name, SHA-256 and size of a file, and the same of those that belong to it."""
    found = {"file": file.name, **_hash(file)}
    companions = {other.name: _hash(other) for other in sorted(others) if other != file}
    return {**found, "companions": companions} if companions else found


def _hash(file: Path) -> dict[str, Any]:
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_notes(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the JSON file beside an export."""
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
