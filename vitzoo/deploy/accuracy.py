"""Accuracy on a folder of labelled images: of a model, or of a file that was exported from one."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitzoo.benchmark.case import ImgSize
from vitzoo.benchmark.machine import this_machine
from vitzoo.benchmark.models import create_for, input_size
from vitzoo.benchmark.results import Recorder, Row
from vitzoo.benchmark.run import header, stamp
from vitzoo.benchmark.timing import Progress, cpu_threads
from vitzoo.deploy.exported import read_exported
from vitzoo.deploy.formats import FORMATS, format_of
from vitzoo.deploy.labelled import LabelledFolder, collate
from vitzoo.export.common import evaluation_mode
from vitzoo.export.notes import PREPROCESSING

SATURATES = (
    "{path} multiplies quantized activations with int8 weights of the full range{made}. This machine, {here}, sums "
    "pairs of such products in 16 bits, which saturates silently: its accuracy here is not the file's. Validate it "
    "where there is VNNI, or quantize with --target {here}"
)


@dataclass(frozen=True)
class Validation:
    """What a model got right; the first fields are timm's `validate.py`'s.

    Attributes:
        model: its name, or the file's.
        top1: share of images whose class comes first, per cent.
        top1_err: the others.
        top5: share of images whose class is among the first five, per cent.
        top5_err: the others.
        param_count: millions; of a file, all constants.
        img_size: pixels of the side, or (H, W).
        crop_pct: share of the shorter side that is kept.
        interpolation: of the resizing.
        images: that were validated on.
        skipped: files that could not be read, path -> reason.
        classes: folders.
        num_classes: of the model.
        batch_size: images a call.
        seconds: in all.
        saturates: whether this machine gives wrong sums for this file.
    """

    model: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    param_count: float
    img_size: int | tuple[int, int]
    crop_pct: float
    interpolation: str
    images: int
    skipped: Mapping[str, str]
    classes: int
    num_classes: int
    batch_size: int
    seconds: float
    saturates: bool

    def to_row(self) -> Row:
        """Return the fields of a row of a result file, skipped files counted."""
        return {"mode": "validate", **asdict(self), "skipped": len(self.skipped)}


@dataclass(frozen=True)
class _Subject:
    """What is validated: images (B, C, H, W) -> logits (B, classes), and what is known of it."""

    name: str
    run: Callable[[Tensor], Tensor]
    num_classes: int
    config: dict[str, Any]
    params: int
    label_names: list[str] | None
    batch_size: int | None = None
    saturates: bool = False


def validate(
    model: nn.Module | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    img_size: ImgSize | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    class_map: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    workers: int = 2,
    threads: int | None = None,
    device: str = "cpu",
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Validation:
    """Count how many images of a folder a model, or an exported file, classifies correctly.

    Files that cannot be read are skipped with a warning and counted. Class folders are numbered by the class map, by
    the model's own label names, by ImageNet's synsets, or, where there are as many of them as classes, in timm's order.

    Args:
        model: a module; a name, for which one is created; or a file, run on the CPU: `*.onnx` in ONNX Runtime,
            `*.pt2` in PyTorch, `*.xml` in OpenVINO.
        data: folder with one subfolder a class.
        kwargs: constructor arguments for a name, `{"pretrained": True}` among them.
        img_size: side in pixels or (H, W); the model's own if None.
        preprocessing: what to change of the model's mean, std, interpolation, crop_pct and crop_mode; what a file that
            says nothing of them needs.
        class_map: text file that names the folder of each class of the model, one a line.
        batch_size: images a call; a dynamic activation scale is a whole batch's.
        workers: processes that read images; 0 reads in this one.
        threads: CPU threads of the model, PyTorch's number if None.
        device: where a model made from a name runs; a module stays where it is.
        output: JSON Lines file for the result.
        force: replace the output if it exists.
        progress: told the present step and the share of the whole that is done.

    Returns:
        The result.

    Raises:
        ExportError: an archive or an IR that cannot be loaded.
        ImportError: a package is missing; the message has the line that installs it.
        OSError: a folder or file that does not exist, an output that cannot be written.
        UnknownModelError: no such model, with close matches.
        ValueError: folders and classes that do not fit each other, no image that can be read, a file that does not say
            how images are prepared.
    """
    tell = progress or (lambda step, done: None)
    changes = {key: value for key, value in (preprocessing or {}).items() if value is not None}
    if unknown := sorted({*changes} - {*PREPROCESSING}):
        raise ValueError(
            f"preprocessing has {', '.join(unknown)}, expected some of {', '.join(PREPROCESSING)}"
        )
    with Recorder(output, force) as recorder, cpu_threads(threads):
        tell("open the model", 0.0)
        if is_file(model):
            if device != "cpu" or kwargs:
                raise ValueError(f"{model} is a file: it runs on the CPU and takes no constructor arguments")
            opened = _file(Path(model), img_size, changes)  # type: ignore[arg-type]
        else:
            opened = _module(model, dict(kwargs or {}), img_size, changes, device)
        with opened as subject:
            found = _validated(subject, data, class_map, batch_size, workers, tell)
        settings = {"data": str(data), "threads": torch.get_num_threads(), "device": device, **subject.config}
        head = header(validate=settings)
        recorder.write(head)
        recorder.write({**stamp(head, "validation"), **found.to_row()})
    return found


def is_file(model: object) -> bool:
    """Return whether a model is named by a file that was exported from it."""
    return isinstance(model, str | os.PathLike) and Path(model).suffix.lower() in [f.suffix for f in FORMATS]


@contextlib.contextmanager
def _module(
    model: Any, kwargs: dict[str, Any], img_size: ImgSize | None, changes: dict[str, Any], device: str
) -> Iterator[_Subject]:
    """Give a module as a subject, in evaluation mode meanwhile."""
    if isinstance(model, nn.Module):
        module = model
    else:
        module = create_for(str(model), img_size, **kwargs).to(device)
    cfg = getattr(module, "pretrained_cfg", None) or {}
    name = model if isinstance(model, str) else cfg.get("architecture") or type(module).__name__
    classes = int(getattr(module, "num_classes", 0) or 0)
    if classes < 2:
        raise ValueError(f"{name} has num_classes {classes}: it is no classifier")
    place = next((p.device for p in module.parameters()), torch.device(device))
    with evaluation_mode(module):
        yield _Subject(
            name=name,
            run=lambda x: module(x.to(place)).float().cpu(),
            num_classes=classes,
            config=_config({**changes, "input_size": input_size(module, img_size)}, cfg),
            params=sum(p.numel() for p in module.parameters()),
            label_names=cfg.get("label_names"),
        )


@contextlib.contextmanager
def _file(path: Path, img_size: ImgSize | None, changes: dict[str, Any]) -> Iterator[_Subject]:
    """Give an exported file as a subject; warn if this machine runs it wrongly."""
    file = read_exported(path)
    known = {**file.preprocessing, **changes}
    if missing := [key for key in ("mean", "std") if key not in known]:
        raise ValueError(
            f"{path} does not say how images are prepared, and there is no {path.with_suffix('.json').name} beside it: "
            f"give {' and '.join(missing)}, and what else differs from timm's defaults"
        )
    batch, channels, *sides = file.shape
    asked = (img_size, img_size) if img_size is None or isinstance(img_size, int) else img_size
    for fixed, wanted in zip(sides, asked, strict=True):
        if fixed is None and wanted is None:
            raise ValueError(f"{path} takes images of any size: name one with img_size")
        if fixed is not None and wanted is not None and fixed != wanted:
            raise ValueError(f"{path} takes images of {sides[0]}x{sides[1]}, not {asked[0]}x{asked[1]}")
    if file.num_classes is None:
        raise ValueError(f"{path} does not say how many classes it has")
    size = [fixed or wanted for fixed, wanted in zip(sides, asked, strict=True)]
    here = this_machine()
    wrong = bool(file.saturates) and here == "x86-avx2"
    if wrong:
        made = f" (it was made for {file.target})" if file.target else ""
        warnings.warn(SATURATES.format(path=path, made=made, here=here), stacklevel=4)
    opened = format_of(path).open(path, None)

    def run(x: Tensor) -> Tensor:
        padded = x if batch is None or len(x) == batch else x[torch.arange(batch) % len(x)]
        return opened(padded)[0][: len(x)]

    yield _Subject(
        name=path.name,
        run=run,
        num_classes=file.num_classes,
        config=_config({**changes, "input_size": (channels or 3, *size)}, known),
        params=file.params,
        label_names=file.label_names,
        batch_size=batch,
        saturates=wrong,
    )


def _config(changes: dict[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's data configuration."""
    return dict(resolve_data_config(changes, pretrained_cfg=dict(cfg)))


def _validated(
    subject: _Subject,
    data: str | os.PathLike[str],
    class_map: str | os.PathLike[str] | None,
    batch_size: int,
    workers: int,
    tell: Progress,
) -> Validation:
    start = time.perf_counter()
    batch_size = subject.batch_size or batch_size
    config = subject.config
    folder = LabelledFolder(
        os.fspath(data),
        subject.num_classes,
        config,
        subject.label_names,
        None if class_map is None else os.fspath(class_map),
    )
    loader: Any = DataLoader(folder, batch_size, num_workers=workers, collate_fn=collate)
    meters, skipped = {1: AverageMeter(), 5: AverageMeter()}, {}
    with torch.inference_mode():
        for index, (x, target, unread) in enumerate(loader):
            tell(f"validate {subject.name}", index / len(loader))
            for path, reason in unread:
                skipped[path] = reason
                warnings.warn(f"{path} is skipped: {reason}", stacklevel=3)
            if x is None:
                continue
            logits = subject.run(x)
            if logits.shape != (len(x), subject.num_classes):
                raise ValueError(
                    f"{subject.name} gives {tuple(logits.shape)} for {len(x)} images, expected logits "
                    f"{(len(x), subject.num_classes)}"
                )
            for meter, value in zip(meters.values(), accuracy(logits, target, tuple(meters)), strict=True):
                meter.update(float(value), len(x))
    images = meters[1].count
    if not images:
        raise ValueError(f"none of the {len(skipped)} images below {data} can be read")
    top1, top5 = (round(meter.avg, 4) for meter in meters.values())
    height, width = config["input_size"][1:]
    return Validation(
        model=subject.name,
        top1=top1,
        top1_err=round(100 - top1, 4),
        top5=top5,
        top5_err=round(100 - top5, 4),
        param_count=round(subject.params / 1e6, 2),
        img_size=height if height == width else (height, width),
        crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
        images=images,
        skipped=skipped,
        classes=len(folder.classes),
        num_classes=subject.num_classes,
        batch_size=batch_size,
        seconds=round(time.perf_counter() - start, 3),
        saturates=subject.saturates,
    )
