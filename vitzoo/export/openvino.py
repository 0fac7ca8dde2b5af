"""Export to OpenVINO IR: the ONNX form of the model converted, run in OpenVINO beside eager, and written whole.

An IR is two files, `NAME.xml` and `NAME.bin`. Weights keep float32; OpenVINO would halve them by default.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.export.check import DISCONTINUOUS
from vitzoo.export.common import (
    CHECKED_BATCHES,
    ExportError,
    ExportReport,
    Progress,
    Run,
    first_cause,
    folder_bytes,
    require,
    silent,
    subject,
)
from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.onnx import export_onnx

SUFFIX = ".xml"


def export_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | Sequence[int] | None = None,
    opset: int = 20,
    check: bool = True,
    progress: Progress | None = None,
    dynamic_size: bool = False,
) -> ExportReport:
    """Export a model, ours or timm's, to an OpenVINO IR with a dynamic batch.

    Names of input and outputs are those of `export_onnx`. Both files are written under other names and renamed when
    complete and checked, the `.xml` last.

    Leave the batch dynamic: `reshape` to a fixed batch gives wrong numbers in OpenVINO 2026.4.1 for a model with a scan
    (Vim).

    Args:
        model: the model, float32, on any device.
        path: file to write, `*.xml`; its folder must exist.
        input_size: side, (H, W) or (C, H, W) in pixels; the model's own if None.
        opset: ONNX operator set of the form that is converted, 18 to 23.
        check: run the IR in OpenVINO at batches 1 and 3 beside eager, and refuse a relative difference above 1e-4.
        progress: called with a few words at the start of each step.
        dynamic_size: make height and width dynamic too, where the model's design allows it; checked at another size.

    Returns:
        What was written.

    Raises:
        ImportError: a package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written (found before the work starts).
        ValueError: another suffix, or an opset, a size or a dtype that is not possible.
        ExportError: the exporter or OpenVINO refused the model, its size is fixed, or the numbers differ.
    """
    start = time.perf_counter()
    require(["openvino", "onnx", "onnxscript"], "export to OpenVINO")
    target, tell = Path(path), progress or silent
    _check_suffix(target)
    with scratch_folder(target) as folder:
        onnx_file = folder / "source.onnx"
        report = export_onnx(model, onnx_file, input_size, opset, False, tell, dynamic_size)
        tell("convert to OpenVINO")
        written = folder / target.name
        nodes = convert_onnx(onnx_file, written)
        for file in [*folder.glob("source.onnx*")]:
            file.unlink()
        difference = None
        if check:
            with subject(model, report.input_size, dynamic_size, silent) as exported:
                draws = 3 if any(report.nodes.get(kind) for kind in DISCONTINUOUS) else 1
                difference = exported.check(open_openvino(written), "OpenVINO", draws, tell)
        size_bytes = folder_bytes(folder)
        publish(folder, target)
    return dataclasses.replace(
        report,
        path=target,
        format="openvino",
        nodes=nodes,
        size_bytes=size_bytes,
        batches=CHECKED_BATCHES if check else (),
        max_relative_difference=difference,
        seconds=time.perf_counter() - start,
    )


@functools.cache
def core() -> Any:
    """Return the process's one `openvino.Core`, which is never released.

    A core's CPU plugin gives the thread that loads it a stack for signal handlers, and puts the one before back when it
    goes. Two cores that go in the order in which they came leave the thread on freed memory, and the next signal with a
    handler ends the process: the SIGCHLD of any subprocess, once a DataLoader had workers (OpenVINO 2026.4.1).
    """
    import openvino

    return openvino.Core()


def convert_onnx(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> dict[str, int]:
    """Convert an ONNX file, float or quantized, to an IR; its numbers are for the caller to check.

    Args:
        source: the ONNX file.
        path: file to write, `*.xml`, with a `.bin` beside it.

    Returns:
        operation -> count.

    Raises:
        ImportError: OpenVINO is missing; the message has the line that installs it.
        ValueError: another suffix.
        ExportError: OpenVINO cannot read the file.
    """
    require(["openvino"], "export to OpenVINO")
    import openvino

    target = Path(path)
    _check_suffix(target)
    try:
        model = _read(source)
    except RuntimeError as error:
        missing = re.search(r"No conversion rule found for operations: (.*)", str(error))
        cause = f"it has no operation for {missing[1]}" if missing else first_cause(error)
        raise ExportError(f"OpenVINO cannot read the ONNX form: {cause}") from error
    openvino.save_model(model, str(target), compress_to_fp16=False)
    return dict(sorted(Counter(op.get_type_name() for op in model.get_ordered_ops()).items()))


def _read(path: str | os.PathLike[str]) -> Any:
    """Return a file as OpenVINO reads it, with the biases of convolutions as constants of the shape they are added in.

    From ONNX they are reshaped by the shape of the convolution's output. A second reader of that output makes OpenVINO
    2026.4.1 compute integer convolutions wrong, a ViT's patch embedding for one.
    """
    import numpy as np
    from openvino import opset13

    model = core().read_model(str(path))
    for node in model.get_ops():
        if node.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        adds = [port.get_node() for port in node.output(0).get_target_inputs()]
        for port in [port for add in adds if add.get_type_name() == "Add" for port in add.inputs()]:
            bias = port.get_source_output().get_node()
            shape = bias.get_output_partial_shape(0)
            if bias.get_type_name() == "Reshape" and shape.is_static:
                constant = opset13.constant(np.array(shape.to_shape(), dtype=np.int64))
                bias.input(1).replace_source_output(constant.output(0))
    return model


def _check_suffix(target: Path) -> None:
    if target.suffix != SUFFIX:
        raise ValueError(f"the IR's name is {target.name!r}, expected one that ends in {SUFFIX}")


def read_ir(path: str | os.PathLike[str]) -> Any:
    """Return an `openvino.Model`.

    Raises:
        ImportError: OpenVINO is missing; the message has the line that installs it.
        FileNotFoundError: there are no weights beside it.
        ExportError: OpenVINO cannot read the file.
    """
    require(["openvino"], "OpenVINO as a runtime")
    weights = Path(path).with_suffix(".bin")
    if not weights.is_file():
        raise FileNotFoundError(f"there is no {weights}, which has the weights of {path}")
    try:
        return _read(path)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot read {path}: {first_cause(error)}") from error


def open_openvino(path: str | os.PathLike[str], threads: int | None = None) -> Run:
    """Open an IR or an ONNX file in OpenVINO on the CPU, in float32 where it is not in integers.

    Args:
        path: the file.
        threads: threads inside an operator, PyTorch's number if None.

    Returns:
        What runs it: from images (B, C, H, W) to its outputs.

    Raises:
        ImportError: OpenVINO is missing; the message has the line that installs it.
        ExportError: OpenVINO cannot read or compile the file.
    """
    request = compile_openvino(path, threads).create_infer_request()

    def run(x: Tensor) -> list[Tensor]:
        found = request.infer({0: x.detach().cpu().contiguous().numpy()})
        return [torch.from_numpy(out.copy()) for out in found.values()]

    return run


def compile_openvino(path: str | os.PathLike[str], threads: int | None = None, profile: bool = False) -> Any:
    """Return an `openvino.CompiledModel`; see `open_openvino`.

    Args:
        path: the file.
        threads: threads inside an operator, PyTorch's number if None.
        profile: record what is executed, and leave attention in separate products: fused ones are out of sight.
    """
    require(["openvino"], "OpenVINO as a runtime")
    # without the precision hint, processors with bfloat16 run in it and nothing would say so
    config: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if profile:
        config |= {"PERF_COUNT": True, "SNIPPETS_MODE": "DISABLE"}
    try:
        # the batch stays dynamic: a graph with a scan reshaped to a fixed one gives wrong numbers in 2026.4.1
        return core().compile_model(_read(path), "CPU", config)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot run {path}: {first_cause(error)}") from error
