"""A float or converted model as a file of any format, with its JSON file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitzoo.benchmark.machine import machine
from vitzoo.deploy.formats import NOTES_SUFFIX, Format, belonging, check_notes, format_of
from vitzoo.export import ExportReport
from vitzoo.export.common import TOLERANCE, Progress, silent
from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.notes import hashes, notes, write_notes


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    input_size: int | Sequence[int] | None = None,
    opset: int = 20,
    check: bool = True,
    progress: Progress | None = None,
    dynamic_size: bool = False,
) -> ExportReport:
    """Export a model to a file that its runtime was seen to run, with a JSON file of the same stem beside it.

    The JSON file has preprocessing, labels, opset, hashes of every file, the share of multiply-accumulates that ran in
    integer kernels, and how far the runtime's numbers are from eager's. All files are written under other names and
    renamed when everything has been checked.

    Args:
        model: the model, float32, on any device; for an archive also one from `convert_int8`.
        path: file to write; its folder must exist.
        format: "onnx" (`*.onnx`), "torch-export" (`*.pt2`) or "openvino" (`*.xml` and `*.bin`); by the suffix if None.
        input_size: side, (H, W) or (C, H, W) in pixels; the model's own if None.
        opset: ONNX operator set, 18 to 23; an archive has none.
        check: run the file beside eager, and refuse a relative difference above 1e-4.
        progress: called with a few words at the start of each step.
        dynamic_size: make height and width dynamic too, where the model's design allows it.

    Returns:
        What was written.

    Raises:
        ImportError: a package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written, or the JSON file is another file's.
        ValueError: a format, a suffix, an opset, a size or a dtype that is not possible.
        ExportError: the exporter or the runtime refused the model, its size is fixed, or the numbers differ.
    """
    target, tell = Path(path), progress or silent
    kind = format_of(target, format)
    with scratch_folder(target) as folder:
        check_notes(target)
        written = folder / target.name
        report = kind.write(model, written, input_size, opset, check, tell, dynamic_size)
        facts = _facts(kind, model, written, report)
        if check:
            tell("count what runs in integers")
            facts |= _coverage(kind, written, report)
        write_notes(written.with_suffix(NOTES_SUFFIX), {**facts, "machine": machine()})
        publish(folder, target)
    return dataclasses.replace(report, path=target)


def _facts(kind: Format, model: nn.Module, written: Path, report: ExportReport) -> dict[str, Any]:
    axes = {0: "batch", **({2: "height", 3: "width"} if report.dynamic_size else {})}
    return {
        "format": report.format,
        **hashes(written, belonging(written)),
        **notes(model, report.input_size, axes, report.outputs),
        "opset": report.opset,
        "nodes": report.nodes,
        "integer_coverage": None,
        "parity": {
            "runtime": kind.runtime,
            "batches": list(report.batches),
            "max_relative_difference": report.max_relative_difference,
            "tolerance": TOLERANCE,
        },
    }


def _coverage(kind: Format, written: Path, report: ExportReport) -> dict[str, Any]:
    try:
        return {"integer_coverage": kind.coverage(written, torch.zeros(1, *report.input_size)).share}
    except (
        ValueError
    ) as error:  # a kernel whose products are out of sight: no figure is better than a wrong one
        return {"integer_coverage_unknown": str(error).replace(str(written), written.name)}
