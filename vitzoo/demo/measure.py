"""Figures of each model of the demo: size, cost, speed, and agreement of its ONNX file on the photographs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from vitzoo.benchmark.flops import count_flops
from vitzoo.benchmark.machine import machine
from vitzoo.benchmark.timing import compare, cpu_threads
from vitzoo.checkpoint import CheckpointError
from vitzoo.demo.int8 import write_int8
from vitzoo.demo.pictures import Figure, figures_of
from vitzoo.export import export_onnx
from vitzoo.export.check import open_session, run_session, time_session
from vitzoo.factory import create_model
from vitzoo.kernels.common.backends import operators
from vitzoo.registry import family_of
from vitzoo.testing import relative_difference

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
THROUGHPUT_BATCH = 8
SEED = 0

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How the demo runs; see `vitzoo.demo.run`."""

    threads: int | None = None
    pretrained: bool = False
    seconds: float = 1.5
    onnx_folder: Path | None = None
    int8_folder: Path | None = None


@dataclass
class Subject:
    """A model at work: its row of figures, its input and what is measured on it."""

    model: nn.Module
    x: Tensor  # the photographs, (2, C, H, W)
    row: dict[str, Any]
    attention: float  # share of its multiply-accumulates in attention's products


def photographs() -> dict[str, Any]:
    """Return file name -> PIL image of the photographs that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS}


def measure_models(
    names: Sequence[str], settings: Settings, tell: Tell
) -> tuple[dict[str, Any], list[Figure]]:
    """Measure models one after another, their speed side by side.

    Args:
        names: model names.
        settings: how.
        tell: told the present step and the share of the whole that is done.

    Returns:
        The results as JSON takes them, and the pictures for the page.
    """
    with cpu_threads(settings.threads):
        return _measured(list(names), settings, tell)


def _measured(names: list[str], settings: Settings, tell: Tell) -> tuple[dict[str, Any], list[Figure]]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    photos = photographs()
    rows: list[dict[str, Any]] = []
    subjects: list[Subject] = []
    figures: list[Figure] = []
    for index, name in enumerate(names):
        row = _described(name)
        rows.append(row)
        tell(f"{name}: create and count", 0.1 * index / len(names))
        with _failures_in(row):
            subject = _create(row, photos, settings)
            figures += figures_of(subject.model, subject.x, row, photos)
            subjects.append(subject)
    _time(subjects, settings, lambda step, done: tell(step, 0.1 + 0.3 * done))
    with tempfile.TemporaryDirectory(prefix="vitzoo-demo-") as scratch:
        folder = settings.onnx_folder or Path(scratch)
        for index, subject in enumerate(subjects):
            name, share = subject.row["model"], 0.4 + 0.6 * index / len(subjects)

            def told(step: str, name: str = name, share: float = share) -> None:
                tell(f"{name}: {step}", share)

            with _failures_in(subject.row):
                keep = settings.onnx_folder is not None
                exported = _export(subject, folder, told, keep)
                if settings.int8_folder is not None:
                    path = settings.int8_folder / f"{name.replace('/', '_')}_int8.onnx"
                    subject.row["int8"] = write_int8(
                        subject.model,
                        photos.values(),
                        path,
                        settings.threads,
                        told,
                        subject.attention,
                        exported,
                    )
                if not keep:
                    exported.unlink()
    tell("done", 1.0)
    result = {
        "photographs": list(photos),
        "pretrained": settings.pretrained,
        "throughput_batch": THROUGHPUT_BATCH,
        "models": rows,
        "operators": operator_backends(),
        "machine": machine(),
        "load_before": load,
    }
    return result, figures


@contextlib.contextmanager
def _failures_in(row: dict[str, Any]) -> Iterator[None]:
    """Write a failure of the block into a row, so that the other models are still measured."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"


def operator_backends() -> dict[str, dict[str, str | None]]:
    """Return operator -> backend -> None if it runs here, else the reason why it does not."""
    return {name: {b.name: b.why_not() for b in op.backends} for name, op in operators.items()}


def _described(name: str) -> dict[str, Any]:
    family = family_of(name)
    return {
        "model": name,
        "family": family.name if family else None,
        "categories": list(family.categories) if family else [],
        "origin": family.origin if family else "timm",
    }


def _create(row: dict[str, Any], photos: dict[str, Any], settings: Settings) -> Subject:
    name = row["model"]
    model, row["weights"] = _with_weights(name, settings.pretrained)
    model.eval()
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config)
    x = torch.stack([transform(photo) for photo in photos.values()])
    counted = count_flops(model, config["input_size"])
    row |= {
        "input_size": list(config["input_size"]),
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": round(counted.gmacs, 4),
        "gflops": round(counted.gflops, 4),
        "uncounted_ops": list(counted.uncounted_ops),
    }
    if row["weights"].startswith("pretrained"):
        row["top1"] = _top1(model, x, list(photos))
    return Subject(model, x, row, counted.by_kind.get("attention", 0.0) / counted.gmacs)


def _with_weights(name: str, pretrained: bool) -> tuple[nn.Module, str]:
    reason = ""
    if pretrained:
        try:
            model = create_model(name, pretrained=True)
        except (CheckpointError, OSError, RuntimeError) as error:
            reason = f"; {error}"
        else:
            cfg: Any = model.pretrained_cfg
            return model, f"pretrained ({cfg.get('tag') or 'default'})"
    torch.manual_seed(SEED)
    return create_model(name), f"untrained (seed {SEED}){reason}"


def _top1(model: nn.Module, x: Tensor, photos: list[str]) -> dict[str, str]:
    from timm.data import ImageNetInfo

    names = ImageNetInfo()
    with torch.inference_mode():
        best = model(x).argmax(-1).tolist()
    return {photo: names.index_to_description(index) for photo, index in zip(photos, best, strict=True)}


def _time(subjects: list[Subject], settings: Settings, tell: Tell) -> None:
    """Write latency at batch 1 and throughput at a larger batch into the rows; rounds are interleaved."""
    if not subjects:
        return
    for half, batch in enumerate((1, THROUGHPUT_BATCH)):

        def told(step: str, done: float, batch: int = batch, half: int = half) -> None:
            tell(f"{step} at batch {batch}", (half + done) / 2)

        timings = compare(
            {s.row["model"]: _forward(s.model, _repeated(s.x, batch)) for s in subjects},
            seconds=settings.seconds,
            min_rounds=5,
            warmup_seconds=1.0,
            images=batch,
            progress=told,
        )
        for subject in subjects:
            timing = timings[subject.row["model"]]
            if batch == 1:
                subject.row["latency_ms"] = _milliseconds(timing.seconds)
            else:
                subject.row["images_per_second"] = round(timing.images_per_second, 2)


def _repeated(x: Tensor, batch: int) -> Tensor:
    return x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].contiguous()


def _forward(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.inference_mode():
            return model(x)

    return forward


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = np.percentile(np.asarray(seconds) * 1e3, (25, 50, 75))
    return {"median": round(float(median), 3), "iqr": round(float(q3 - q1), 3), "rounds": len(seconds)}


def _export(subject: Subject, folder: Path, tell: Callable[[str], None], keep: bool) -> Path:
    path = folder / f"{subject.row['model'].replace('/', '_')}.onnx"
    tell("export to ONNX")
    report = export_onnx(subject.model, path, subject.row["input_size"], progress=tell)
    tell("run on the photographs")
    session = open_session(path)
    with torch.inference_mode():
        expected = subject.model(subject.x)
    (out,) = run_session(session, subject.x)
    times = time_session(session, subject.x[:1])
    subject.row["onnx"] = {
        "opset": report.opset,
        "size_bytes": report.size_bytes,
        "nodes": report.nodes,
        "export_seconds": round(report.seconds, 2),
        "max_relative_difference": report.max_relative_difference,
        "photo_relative_difference": relative_difference(out, expected),
        "latency_ms": _milliseconds(times),
        "file": path.name if keep else None,
    }
    return path
