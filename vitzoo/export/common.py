"""What exports share: the model as it is exported, inputs, the report, and the comparison with eager."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils import _pytree

from vitzoo.export.check import largest_difference

TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)
OTHER_SIZE = (64, 32)  # pixels that a dynamic height and width are checked with beyond the model's own
INSTALL = {
    "onnx": "pip install 'vitzoo[onnx]'",
    "onnxscript": "pip install 'vitzoo[onnx]'",
    "onnxruntime": "pip install 'vitzoo[onnx]'",
    "openvino": "pip install 'vitzoo[openvino]'",
    "torchao": "pip install 'vitzoo[inductor]'",
}

Progress = Callable[[str], None]
Run = Callable[[Tensor], list[Tensor]]


class ExportError(RuntimeError):
    """The model cannot be exported, or the exported file does not give the model's numbers."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Attributes:
        path: the file.
        format: "onnx", "torch-export" or "openvino".
        opset: ONNX operator set; None for a format without one.
        input_size: channels, height and width of the one input; its batch is dynamic.
        dynamic_size: height and width are dynamic too.
        outputs: names of the outputs.
        nodes: node type -> count; of ONNX, bodies of `Scan`, `If` and `Loop` included.
        size_bytes: size of the file, and of those that belong to it.
        batches: batch sizes at which it was run beside eager.
        max_relative_difference: largest norm(file - eager) / norm(eager), None if it was not checked.
        seconds: time of the whole export, check included.
    """

    path: Path
    format: str
    opset: int | None
    input_size: tuple[int, int, int]
    dynamic_size: bool
    outputs: tuple[str, ...]
    nodes: dict[str, int]
    size_bytes: int
    batches: tuple[int, ...]
    max_relative_difference: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and what is exported of it.

    Attributes:
        model: the model.
        size: channels, height and width of its images.
        dynamic_size: whether height and width are to be dynamic.
        outputs: names of its outputs.
    """

    model: nn.Module
    size: tuple[int, int, int]
    dynamic_size: bool
    outputs: tuple[str, ...]

    def make_input(self, batch: int, seed: int = 0, other: bool = False) -> Tensor:
        """Return images (batch, C, H, W) of the model's size, or of another one, on its device."""
        return _images(self.model, (self.size[0], *self.other_size) if other else self.size, batch, seed)

    def eager(self, x: Tensor) -> list[Tensor]:
        """Return the model's outputs."""
        return _eager(self.model, x)

    @property
    def other_size(self) -> tuple[int, int]:
        """Return the height and width that a dynamic size is checked with."""
        return self.size[1] + OTHER_SIZE[0], self.size[2] + OTHER_SIZE[1]

    @property
    def axes(self) -> dict[int, str]:
        """Return axis -> name of the input's dynamic ones."""
        return {0: "batch", 2: "height", 3: "width"} if self.dynamic_size else {0: "batch"}

    def report(
        self,
        path: Path,
        format: str,
        opset: int | None,
        nodes: Mapping[str, int],
        size_bytes: int,
        difference: float | None,
        start: float,
    ) -> ExportReport:
        """Return the report of an export that began at `start` of `time.perf_counter`; see its fields."""
        return ExportReport(
            path=path,
            format=format,
            opset=opset,
            input_size=self.size,
            dynamic_size=self.dynamic_size,
            outputs=self.outputs,
            nodes=dict(sorted(nodes.items())),
            size_bytes=size_bytes,
            batches=() if difference is None else CHECKED_BATCHES,
            max_relative_difference=difference,
            seconds=time.perf_counter() - start,
        )

    def check(self, run: Run, runtime: str, draws: int, tell: Progress) -> float:
        """Compare an exported file with the model.

        Args:
            run: runs the file.
            runtime: name of what runs it.
            draws: see `largest_difference`.
            tell: told each step.

        Returns:
            The largest relative difference.

        Raises:
            ExportError: the file cannot be run, or its numbers are others.
        """
        found = self._compared(run, runtime, CHECKED_BATCHES, False, draws, tell)
        if self.dynamic_size:
            tell(f"compare at {self.other_size[0]}x{self.other_size[1]} pixels")
            found = max(found, self._compared(run, runtime, CHECKED_BATCHES[-1:], True, draws, tell))
        if not found <= TOLERANCE:
            raise ExportError(
                f"the exported file differs from eager by {found:.1e} (relative) in {runtime}, "
                f"more than {TOLERANCE:.0e}"
            )
        return found

    def _compared(
        self, run: Run, runtime: str, batches: Sequence[int], other: bool, draws: int, tell: Progress
    ) -> float:
        make_input = functools.partial(self.make_input, other=other)
        try:
            return largest_difference(run, self.eager, make_input, batches, TOLERANCE, draws, tell)
        except Exception as error:
            cause = first_cause(error)
            if not other:
                raise ExportError(f"{runtime} cannot run the exported file: {cause}") from error
            raise ExportError(
                f"the height and width of {type(self.model).__name__} cannot be dynamic: exported at "
                f"{self.size[1]}x{self.size[2]} pixels it does not run at "
                f"{self.other_size[0]}x{self.other_size[1]} in {runtime}: {cause}"
            ) from error


@contextlib.contextmanager
def subject(
    model: nn.Module, input_size: int | Sequence[int] | None, dynamic_size: bool, tell: Progress
) -> Iterator[Subject]:
    """Give a model as it is exported: without gradients, in evaluation mode, and as it came afterwards.

    Args:
        model: the model, float32, on any device; what torch.compile wrapped is unwrapped.
        input_size: side, (H, W) or (C, H, W) in pixels; the model's own if None.
        dynamic_size: whether height and width are to be dynamic.
        tell: told each step.

    Raises:
        ValueError: a size or a dtype that is not possible.
        ExportError: a dynamic size, and a model that takes one size only.
        Exception: whatever the model raises for an input of that size.
    """
    model = getattr(model, "_orig_mod", model)
    with evaluation_mode(model):
        size = _input_size(model, input_size)
        tell("run the model")
        # an input the model refuses is refused here, in the model's words; eager code fills its caches too
        count = len(_eager(model, _images(model, size, 2, 0)))
        found = Subject(model, size, dynamic_size, tuple(_output_names(model, count)))
        if dynamic_size:
            try:
                found.eager(found.make_input(2, other=True))
            except Exception as error:
                raise ExportError(
                    f"{type(model).__name__} takes images of {size[1]}x{size[2]} pixels only, so its height and "
                    f"width cannot be dynamic: {first_cause(error)}"
                ) from error
        yield found


def silent(step: str) -> None:
    """Ignore a step."""


def require(packages: Sequence[str], what: str) -> None:
    """Raise ImportError with the line that installs what is missing of the packages.

    Args:
        packages: of `INSTALL`.
        what: what needs them, the beginning of the message.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}, not installed here: {INSTALL[missing[0]]}")


def first_cause(error: BaseException) -> str:
    """Return the first two lines of what an error was raised from in the beginning."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


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


def _images(model: nn.Module, size: tuple[int, ...], batch: int, seed: int) -> Tensor:
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    if device.type == "meta":
        raise ValueError("the model is on the meta device and has no weights: load or initialise them first")
    if dtype != torch.float32:
        raise ValueError(f"the model's dtype is {dtype}, export takes float32: call model.float() first")
    generator = torch.Generator().manual_seed(100 * batch + seed)
    return torch.randn(batch, *size, generator=generator).to(device)


def _eager(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [out for out in _pytree.tree_leaves(model(x)) if isinstance(out, Tensor)]


def _output_names(model: nn.Module, count: int) -> list[str]:
    if count > 1:
        return [f"output_{index}" for index in range(count)]
    classifies = getattr(model, "num_classes", 0) and not hasattr(model, "return_layers")
    return ["logits" if classifies else "output"]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, and every module back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
