"""Export to ONNX: dynamic batch, checked against eager in ONNX Runtime, written whole or not at all.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils import _pytree

from vitzoo._version import __version__
from vitzoo.export.check import DISCONTINUOUS, largest_difference
from vitzoo.export.files import publish, scratch_folder
from vitzoo.layers.attention import PlainAttention

OPSETS = (18, 23)
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)
# a protobuf message holds 2 GiB at most; above this, weights go to `<file>.data` beside it
SINGLE_FILE_BYTES = 1536 * 2**20

Progress = Callable[[str], None]


class ExportError(RuntimeError):
    """The model cannot be exported, or the exported file does not give the model's numbers."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Attributes:
        path: the file.
        opset: ONNX operator set.
        input_size: channels, height and width of the one input, `input`; its batch is dynamic.
        outputs: names of the outputs.
        nodes: node type -> count, bodies of `Scan`, `If` and `Loop` included.
        size_bytes: size of the file, and of its `.data` file where there is one.
        batches: batch sizes at which it was run beside eager.
        max_relative_difference: largest norm(onnx - eager) / norm(eager), None if it was not checked.
        seconds: time of the whole export, check included.
    """

    path: Path
    opset: int
    input_size: tuple[int, int, int]
    outputs: tuple[str, ...]
    nodes: dict[str, int]
    size_bytes: int
    batches: tuple[int, ...]
    max_relative_difference: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return {**asdict(self), "path": str(self.path)}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | Sequence[int] | None = None,
    opset: int = 20,
    check: bool = True,
    progress: Progress | None = None,
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

    Returns:
        What was written.

    Raises:
        ImportError: an ONNX package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written (found before the work starts).
        ValueError: an opset, a size or a dtype that is not possible.
        ExportError: the exporter or ONNX Runtime refused the model, or the numbers differ.
    """
    start = time.perf_counter()
    require_packages(check)
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[1]}")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    target, tell = Path(path), progress or _silent
    with scratch_folder(target) as folder, _as_exported(model):
        size = _input_size(model, input_size)
        make_input = _input_maker(model, size)
        eager = _eager(model)
        tell("run the model")
        # an input the model refuses is refused here, in the model's words; eager code fills its caches too
        reference = eager(make_input(2, 0))
        names = _output_names(model, len(reference))
        tell("trace and translate")
        program = translate(model, make_input(2, 0), names, opset)
        nodes = Counter(node.op_type for node in program.model.graph.all_nodes())
        describe(program.model, model, size)
        tell("write")
        written = folder / target.name
        program.save(str(written), external_data=_weight_bytes(model) > SINGLE_FILE_BYTES)
        difference = None
        if check:
            draws = 3 if any(nodes[kind] for kind in DISCONTINUOUS) else 1
            difference = _checked(written, eager, make_input, draws, tell)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        publish(folder, target)
    return ExportReport(
        path=target,
        opset=opset,
        input_size=size,
        outputs=tuple(names),
        nodes=dict(sorted(nodes.items())),
        size_bytes=size_bytes,
        batches=CHECKED_BATCHES if check else (),
        max_relative_difference=difference,
        seconds=time.perf_counter() - start,
    )


def _silent(step: str) -> None:
    """Ignore a step."""


def require_packages(check: bool) -> None:
    """Raise ImportError with the line that installs what export, and its check, need."""
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if check else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export to ONNX needs {', '.join(missing)}, not installed here: pip install 'vitzoo[onnx]'"
        )


def _input_size(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    channels, *sides = (int(n) for n in get_model_input_config(model)["input_size"])
    channels = int(getattr(model, "in_chans", channels))
    if isinstance(input_size, int):
        sides = [input_size, input_size]
    elif input_size is not None:
        given = [int(n) for n in input_size]
        if len(given) not in (2, 3):
            raise ValueError(f"input_size {tuple(given)} is not a side, (H, W) or (C, H, W)")
        sides = given[-2:]
        channels = given[0] if len(given) == 3 else channels
    if min(channels, *sides) < 1:
        raise ValueError(f"input_size {(channels, *sides)} is not positive")
    return channels, sides[0], sides[1]


def _input_maker(model: nn.Module, size: tuple[int, int, int]) -> Callable[[int, int], Tensor]:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    if device.type == "meta":
        raise ValueError("the model is on the meta device and has no weights: load or initialise them first")
    if dtype != torch.float32:
        raise ValueError(f"the model's dtype is {dtype}, export takes float32: call model.float() first")

    def make(batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * batch + seed)
        return torch.randn(batch, *size, generator=generator).to(device)

    return make


def _eager(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    def run(x: Tensor) -> list[Tensor]:
        return [out for out in _pytree.tree_leaves(model(x)) if isinstance(out, Tensor)]

    return run


def _output_names(model: nn.Module, count: int) -> list[str]:
    if count > 1:
        return [f"output_{index}" for index in range(count)]
    classifies = getattr(model, "num_classes", 0) and not hasattr(model, "return_layers")
    return ["logits" if classifies else "output"]


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def translate(
    model: nn.Module,
    x: Tensor,
    names: list[str],
    opset: int,
    translations: Mapping[Any, Callable[..., Any]] | None = None,
) -> Any:
    """Return torch's ONNX program of the model for inputs like x, whose batch of 2 becomes dynamic.

    Args:
        model: in evaluation mode.
        x: an example, (2, C, H, W).
        names: of the outputs.
        opset: ONNX operator set.
        translations: operator -> its translation, beside those that torch has.

    Raises:
        ExportError: the exporter refused the model or fixed its batch.
    """
    try:
        with _quiet(), PlainAttention():
            program = torch.onnx.export(
                model,
                (x,),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=["input"],
                output_names=names,
                opset_version=opset,
                custom_translation_table=dict(translations or {}),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be translated to ONNX: {_first_cause(error)}"
        ) from error
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    assert shape is not None
    batch = shape[0]
    if isinstance(batch, int):
        raise ExportError(
            f"the exporter fixed the batch of {type(model).__name__} at {batch}: its forward pass turns the "
            "batch size into a constant"
        )
    return program


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"


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
        "mean": data["mean"],
        "std": data["std"],
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        **(more or {}),
    }
    graph_model.metadata_props.update({key: str(value) for key, value in notes.items()})


def _checked(
    path: Path,
    eager: Callable[[Tensor], list[Tensor]],
    make_input: Callable[[int, int], Tensor],
    draws: int,
    progress: Progress,
) -> float:
    try:
        difference = largest_difference(path, eager, make_input, CHECKED_BATCHES, TOLERANCE, draws, progress)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {_first_cause(error)}") from error
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the exported file differs from eager by {difference:.1e} (relative), more than {TOLERANCE:.0e}"
        )
    return difference


@contextlib.contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, and every module back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks off the streams; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
