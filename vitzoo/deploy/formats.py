"""The kinds of file that models are handed over in: who writes one, what runs it, and how its products are counted."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitzoo.deploy.coverage import Coverage, onnxruntime_coverage, openvino_coverage, torch_coverage
from vitzoo.export import ExportReport, export_onnx, export_openvino, export_program
from vitzoo.export.check import open_session, run_session
from vitzoo.export.common import Progress, Run
from vitzoo.export.openvino import convert_onnx, open_openvino
from vitzoo.export.program import load
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization.convert import convert_int8, simulate_int8
from vitzoo.quantization.model import QuantizedModel

NOTES_SUFFIX = ".json"


def _itself(quantized: QuantizedModel) -> Callable[[Tensor], Tensor]:
    return quantized


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        name: what `--format` calls it.
        suffix: of its files.
        runtime: what runs it.
        write: writes a float model: (model, path, input_size, opset, check, progress, dynamic_size) -> report.
        write_int8: writes a quantized one: (quantized, path, model, target, opset) -> nodes of the graph.
        has_opset: it is made from ONNX.
        simulation: what a quantized file is compared with.
        open: (path, threads) -> what runs the file.
        coverage: (path, one image (1, C, H, W)) -> its products.
    """

    name: str
    suffix: str
    runtime: str
    write: Callable[..., ExportReport]
    write_int8: Callable[..., dict[str, int]]
    open: Callable[[Path, int | None], Run]
    coverage: Callable[[Path, Tensor], Coverage]
    has_opset: bool = True
    simulation: Callable[[QuantizedModel], Callable[[Tensor], Tensor]] = _itself


def format_of(path: str | os.PathLike[str] | None, name: str | None = None) -> Format:
    """Return the format of a name, or of a file's suffix; ONNX where there is neither.

    Raises:
        ValueError: a name or a suffix that no format has, or two that disagree.
    """
    known = ", ".join(f"{f.name} ({f.suffix})" for f in FORMATS)
    suffix = Path(path).suffix.lower() if path is not None else None
    found = [f for f in FORMATS if name in (None, f.name) and suffix in (None, f.suffix)]
    if name is not None and name not in [f.name for f in FORMATS]:
        raise ValueError(f"there is no format {name!r}; formats: {known}")
    if not found:
        what = "says no format" if name is None else f"is not of format {name}"
        raise ValueError(f"the file name {Path(str(path)).name!r} {what} by its suffix; formats: {known}")
    return found[0]


def has_whole_range(quantized: QuantizedModel) -> bool:
    """Return whether a weight has codes outside [-64, 63], whose sums saturate on CPUs with AVX2 and without VNNI."""
    return any(plan.weight is not None and plan.weight.qmax > 63 for plan in quantized.plans.values())


def belonging(file: Path) -> list[Path]:
    """Return the files that belong to an exported one: an IR's weights, those of an ONNX file above 1.5 GiB."""
    found = [file.with_suffix(".bin")] if file.suffix == ".xml" else [file.with_name(f"{file.name}.data")]
    return [other for other in found if other.exists()]


def check_notes(target: Path) -> None:
    """Refuse a name whose JSON file is that of another exported file.

    Raises:
        FileExistsError: it is; the message names both.
    """
    beside = target.with_suffix(NOTES_SUFFIX)
    try:
        owner = json.loads(beside.read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if owner != target.name and (target.parent / str(owner)).exists():
        raise FileExistsError(
            errno.EEXIST,
            f"this JSON file describes {owner}; choose another name than {target.name}",
            str(beside),
        )


def _export_program(
    model: nn.Module,
    path: Path,
    input_size: int | Sequence[int] | None,
    opset: int,
    check: bool,
    progress: Progress | None,
    dynamic_size: bool = False,
) -> ExportReport:
    return export_program(model, path, input_size, check, progress, dynamic_size)


def _write_program(
    quantized: QuantizedModel, path: Path, model: nn.Module, target: str, opset: int
) -> dict[str, int]:
    return export_program(convert_int8(model, quantized), path, quantized.input_size, check=True).nodes


def _write_openvino(
    quantized: QuantizedModel, path: Path, model: nn.Module, target: str, opset: int
) -> dict[str, int]:
    if target == "x86-avx2" and has_whole_range(quantized):
        raise ValueError(
            f"recipe {quantized.recipe.name!r} has weights of the full range, for {target} written as uint8, which "
            "OpenVINO runs in float; quantize with reduce_range = true"
        )
    source = path.with_suffix(".source.onnx")
    try:
        write_quantized(quantized, source, model, target, opset)
        return convert_onnx(source, path)
    finally:
        source.unlink(missing_ok=True)


def _open_onnx(path: Path, threads: int | None) -> Run:
    return functools.partial(run_session, open_session(path, threads))


def _open_program(path: Path, threads: int | None) -> Run:
    return load(path)  # PyTorch's threads are the process's


def _program_coverage(path: Path, x: Tensor) -> Coverage:
    module: Any = torch.export.load(path).module()
    return torch_coverage(fx.GraphModule(module, module.graph), x.shape[1:])  # its own class refuses eval()


FORMATS = (
    Format("onnx", ".onnx", "ONNX Runtime", export_onnx, write_quantized, _open_onnx, onnxruntime_coverage),
    Format(
        "torch-export",
        ".pt2",
        "PyTorch",
        _export_program,
        _write_program,
        _open_program,
        _program_coverage,
        has_opset=False,
        simulation=simulate_int8,
    ),
    Format(
        "openvino", ".xml", "OpenVINO", export_openvino, _write_openvino, open_openvino, openvino_coverage
    ),
)
