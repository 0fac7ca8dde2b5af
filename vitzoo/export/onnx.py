"""Export to ONNX: dynamic batch, checked against eager in ONNX Runtime, written whole or not at all.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vitzoo._version import __version__
from vitzoo.export.check import DISCONTINUOUS, open_session, run_session
from vitzoo.export.common import (
    ExportError,
    ExportReport,
    Progress,
    first_cause,
    folder_bytes,
    quiet,
    require,
    silent,
    subject,
)
from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.notes import PREPROCESSING
from vitzoo.layers.attention import PlainAttention

OPSETS = (18, 23)
# a protobuf message holds 2 GiB at most; above this, weights go to `<file>.data` beside it
SINGLE_FILE_BYTES = 1536 * 2**20


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | Sequence[int] | None = None,
    opset: int = 20,
    check: bool = True,
    progress: Progress | None = None,
    dynamic_size: bool = False,
) -> ExportReport:
    """Export a model, ours or timm's, to an ONNX file with a dynamic batch.

    The file has one input, `input` (B, C, H, W), float32. Its output is `logits` (B, num_classes) where the
    model has a classifier, `output` otherwise, and `output_0`, `output_1`, ... where it returns several.
    It is written under another name and renamed when complete and checked: after an error nothing is left
    behind, and an older file of that name stays as it was. The model is exported in evaluation mode and given
    back as it came.

    Args:
        model: the model, float32, on any device.
        path: file to write; its folder must exist.
        input_size: side, (H, W) or (C, H, W) in pixels; the model's own if None.
        opset: ONNX operator set, 18 to 23.
        check: run the file in ONNX Runtime at batches 1 and 3 beside eager, and refuse a relative difference
            above 1e-4.
        progress: called with a few words at the start of each step.
        dynamic_size: make height and width dynamic too, where the model's design allows it; checked at another
            size.

    Returns:
        What was written.

    Raises:
        ImportError: an ONNX package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written (found before the work starts).
        ValueError: an opset, a size or a dtype that is not possible.
        ExportError: the exporter or ONNX Runtime refused the model, its size is fixed, or the numbers differ.
    """
    start = time.perf_counter()
    require_packages(check)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[1]}")
    target, tell = Path(path), progress or silent
    with (
        scratch_folder(target) as folder,
        subject(model, input_size, dynamic_size, tell) as exported,
    ):
        tell("trace and translate")
        names = [*exported.outputs]
        program = translate(exported.model, exported.make_input(2), names, opset, axes=exported.axes)
        nodes = Counter(node.op_type for node in program.model.graph.all_nodes())
        describe(program.model, exported.model, exported.size)
        tell("write")
        written = folder / target.name
        program.save(str(written), external_data=_weight_bytes(exported.model) > SINGLE_FILE_BYTES)
        difference = None
        if check:
            draws = 3 if any(nodes[kind] for kind in DISCONTINUOUS) else 1
            difference = exported.check(_runner(written), "ONNX Runtime", draws, tell)
        size_bytes = folder_bytes(folder)
        publish(folder, target)
    return exported.report(target, "onnx", opset, nodes, size_bytes, difference, start)


def _runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    try:
        return functools.partial(run_session, open_session(path))
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {first_cause(error)}") from error


def require_packages(check: bool) -> None:
    """Raise ImportError with the line that installs what export, and its check, need."""
    require(["onnx", "onnxscript", *(["onnxruntime"] if check else [])], "export to ONNX")


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def translate(
    model: nn.Module,
    x: Tensor,
    names: list[str],
    opset: int,
    translations: Mapping[Any, Callable[..., Any]] | None = None,
    axes: Mapping[int, str] | None = None,
) -> Any:
    """Return torch's ONNX program of the model for inputs like x, whose batch of 2 becomes dynamic.

    Args:
        model: in evaluation mode.
        x: an example, (2, C, H, W).
        names: of the outputs.
        opset: ONNX operator set.
        translations: operator -> its translation, beside those that torch has.
        axes: axis -> name of the dynamic ones; the batch alone if None.

    Raises:
        ExportError: the exporter refused the model or fixed a dynamic axis.
    """
    axes = dict(axes or {0: "batch"})
    try:
        with quiet(), PlainAttention():
            program = torch.onnx.export(
                model,
                (x,),
                dynamo=True,
                dynamic_shapes=(axes,),
                input_names=["input"],
                output_names=names,
                opset_version=opset,
                custom_translation_table=dict(translations or {}),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be translated to ONNX: {first_cause(error)}"
        ) from error
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    for axis, name in axes.items():
        if isinstance(shape[axis], int):
            raise ExportError(
                f"the exporter fixed the {name} of {type(model).__name__} at {shape[axis]}: its forward pass turns "
                f"the {name} into a constant"
            )
    return program


def describe(
    graph_model: Any, model: nn.Module, size: tuple[int, int, int], more: Mapping[str, str] | None = None
) -> None:
    """Note in the file what it is and how images are prepared for it; drop the paths of sources here."""
    for node in graph_model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    data = resolve_model_data_config(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    notes = {
        "vitzoo.version": __version__,
        "architecture": cfg.get("architecture") or type(model).__name__,
        "input_size": size,
        **{key: data[key] for key in PREPROCESSING},
        **(more or {}),
    }
    graph_model.metadata_props.update({key: str(value) for key, value in notes.items()})
