"""Throughput and latency of models: one row each, in timm's key names, measured in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from vitzoo.benchmark.flops import count_flops
from vitzoo.benchmark.timing import Progress, Timing, compare
from vitzoo.factory import create_model
from vitzoo.registry import check_name

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchSettings:
    """How models are measured; the same for all of one run.

    Attributes:
        batch_size: images a call. It is never made smaller: what does not fit fails.
        img_size: side or (H, W) in pixels; each model's own if None.
        threads: CPU threads inside an operator; PyTorch's number if None.
        seconds: time spent on each model after its warm-up.
        min_rounds: rounds at least.
        device: where the models run.
        kwargs: constructor arguments of every model.
    """

    batch_size: int = 1
    img_size: int | tuple[int, int] | None = None
    threads: int | None = None
    seconds: float = 2.0
    min_rounds: int = 10
    device: str = "cpu"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not a positive integer")


def input_size(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Return (C, H, W) of a model's input: its own, with another height and width if asked for."""
    channels, height, width = get_model_input_config(model)["input_size"]
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return channels, height, width


def create_for(name: str, img_size: int | tuple[int, int] | None, **kwargs: Any) -> nn.Module:
    """Create a model for an input size; models that take any size have no such argument and need none."""
    if img_size is None:
        return create_model(name, **kwargs)
    try:
        return create_model(name, **{"img_size": img_size, **kwargs})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create_model(name, **kwargs)


def benchmark_models(
    names: Sequence[str], settings: BenchSettings | None = None, progress: Progress | None = None
) -> list[Row]:
    """Measure models side by side.

    Args:
        names: model names, with or without tags; a name given twice is measured twice.
        settings: how.
        progress: told the present step and the share of the whole that is done.

    Returns:
        One row a model, in the order given. A model that cannot be built or run has a row whose "error" says
        why, and the others are measured all the same.

    Raises:
        UnknownModelError: a name that no model has; nothing is measured then.
        ValueError: settings that make no sense.
    """
    settings = settings or BenchSettings()
    for name in names:
        check_name(name)
    rows: list[Row] = []
    work: dict[str, Callable[[], Any]] = {}
    for index, name in enumerate(names):
        row: Row = {"model": name}
        rows.append(row)
        try:
            model, x = _prepare(name, settings, row)
            label = f"{index}:{name}"
            work[label] = _forward(model, x)
            work[label]()
        except Exception as error:
            work.pop(f"{index}:{name}", None)
            row["error"] = f"{type(error).__name__}: {error}"
    if work:
        timings = compare(
            work,
            seconds=settings.seconds,
            min_rounds=settings.min_rounds,
            threads=settings.threads,
            images=settings.batch_size,
            progress=progress,
        )
        for label, timing in timings.items():
            rows[int(label.partition(":")[0])].update(_figures(timing))
    return rows


def _prepare(name: str, settings: BenchSettings, row: Row) -> tuple[nn.Module, Tensor]:
    """Create a model and its input, and write down what is known of it without running it."""
    model = create_for(name, settings.img_size, **settings.kwargs).eval().to(settings.device)
    size = input_size(model, settings.img_size)
    counted = count_flops(model, size)
    row |= {
        "infer_img_size": size[1] if size[1] == size[2] else list(size[1:]),
        "infer_batch_size": settings.batch_size,
        "infer_gmacs": round(counted.gmacs, 4),
        "infer_gflops": round(counted.gflops, 4),
        "scan_gmacs": round(counted.by_kind.get("scan", 0.0), 4),
        "uncounted_ops": counted.uncounted_ops,
        "param_count": round(counted.params / 1e6, 3),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": settings.device,
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(settings.batch_size, *size, generator=generator)
    return model, x.to(settings.device)


def _forward(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.inference_mode():
            return model(x)

    return forward


def _figures(timing: Timing) -> Row:
    return {
        "infer_samples_per_sec": timing.images_per_second,
        "infer_step_time": 1e3 * timing.median,
        "iqr_ms": 1e3 * timing.iqr,
        **{f"p{p}_ms": 1e3 * timing.percentile(p) for p in (50, 90, 99)},
        "rounds": len(timing.seconds),
        "calls_per_round": timing.calls_per_round,
        "warmup_calls": timing.warmup_calls,
        "threads": timing.threads,
    }
