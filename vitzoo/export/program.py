"""Export to a torch.export archive (`.pt2`): what PyTorch runs without the model's code, ours by our kernels.

Our operators stay whole in the graph, `torch.ops.vitzoo`, and attention stays PyTorch's fused call: the archive runs as
fast as the model. A process that loads an archive with our operators imports vitzoo first.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from vitzoo.export.common import (
    ExportError,
    ExportReport,
    Progress,
    Run,
    Subject,
    first_cause,
    quiet,
    silent,
    subject,
)
from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.notes import notes
from vitzoo.kernels.common.registration import keep_operators

SUFFIX = ".pt2"
NOTES = "vitzoo.json"  # the archive's own copy of what is known of the model


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | Sequence[int] | None = None,
    check: bool = True,
    progress: Progress | None = None,
    dynamic_size: bool = False,
) -> ExportReport:
    """Export a model, float or made by `convert_int8`, to a torch.export archive with a dynamic batch.

    `torch.export.load(path).module()` gives back what takes images (B, C, H, W) and returns what the model returns,
    after `import vitzoo` where the model is of ours or converted. It is written under another name and renamed when
    complete and checked, and holds no path of this machine. The model is given back as it came.

    Args:
        model: the model, its float tensors float32, on any device.
        path: file to write, `*.pt2`; its folder must exist.
        input_size: side, (H, W) or (C, H, W) in pixels; the model's own if None.
        check: load the archive and run it at batches 1 and 3 beside eager, and refuse a relative difference above
            1e-4.
        progress: called with a few words at the start of each step.
        dynamic_size: make height and width dynamic too, where the model's design allows it; checked at another size.

    Returns:
        What was written.

    Raises:
        OSError: the folder does not exist or cannot be written (found before the work starts).
        ValueError: another suffix, or a size or a dtype that is not possible.
        ExportError: torch.export refused the model, its size is fixed, or the numbers differ.
    """
    start = time.perf_counter()
    target, tell = Path(path), progress or silent
    if target.suffix != SUFFIX:
        raise ValueError(f"the archive's name is {target.name!r}, expected one that ends in {SUFFIX}")
    with (
        scratch_folder(target) as folder,
        subject(model, input_size, dynamic_size, tell) as exported,
    ):
        tell("trace")
        program = _traced(exported)
        tell("write")
        written = folder / target.name
        with quiet():
            known = json.dumps(notes(exported.model, exported.size, exported.axes, exported.outputs))
            torch.export.save(program, written, extra_files={NOTES: known})
        difference = None
        if check:
            difference = exported.check(load(written), "the loaded archive", 1, tell)
        size_bytes = written.stat().st_size
        publish(folder, target)
    nodes = Counter(_name(node.target) for node in program.graph.nodes if node.op == "call_function")
    return exported.report(target, "torch-export", None, nodes, size_bytes, difference, start)


def load(path: str | os.PathLike[str]) -> Run:
    """Return what runs an archive: from images (B, C, H, W) to its outputs.

    Raises:
        ExportError: the file cannot be loaded.
    """
    module = open_program(path)[0].module()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [out for out in _pytree.tree_leaves(module(x)) if isinstance(out, Tensor)]

    return run


def open_program(path: str | os.PathLike[str]) -> tuple[ExportedProgram, dict[str, Any]]:
    """Return an archive's program and the notes of ours that it carries.

    Raises:
        ExportError: the file cannot be loaded.
    """
    extra = {NOTES: ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=extra)
            known = json.loads(extra[NOTES]) if extra[NOTES] else {}
    except Exception as error:
        raise ExportError(f"torch.export cannot load {path}: {first_cause(error)}") from error
    return program, known


def _traced(exported: Subject) -> ExportedProgram:
    shapes = (dict.fromkeys(exported.axes, Dim.DYNAMIC),)
    try:
        with quiet(), keep_operators():
            program = torch.export.export(
                exported.model, (exported.make_input(2),), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise ExportError(
            f"{type(exported.model).__name__} cannot be exported: {first_cause(error)}"
        ) from error
    program.example_inputs = None  # images of no interest, and as large as the batch
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _name(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )
