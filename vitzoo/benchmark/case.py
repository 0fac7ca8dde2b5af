"""What is measured (`Case`) and how (`Measure`), as plain data that travels to other processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitzoo.registry import check_name

ImgSize = int | tuple[int, int]

DTYPES = ("float32", "bfloat16", "float16", "int8")
MEMORY_FORMATS = ("contiguous", "channels_last")
RUNTIMES = ("eager", "compiled", "onnxruntime", "openvino")
FILE_RUNTIMES = ("onnxruntime", "openvino")  # what runs an ONNX file
MODES = ("infer", "train")
ATTENTIONS = ("default", "matrix")

INT8_RUNTIMES = ("onnxruntime",)  # what a model is quantized for


class Unsupported(ValueError):
    """A combination of settings that cannot be measured; a sweep notes it in a row and goes on."""


@dataclass(frozen=True)
class Case:
    """One model in one setting: one row of the results.

    Attributes:
        model: a name of vitzoo or timm, `timm:NAME` for timm's own, `layer:NAME` for one attention layer (see
            `vitzoo.benchmark.layers`), a path `FILE.onnx`, or any text where `module` is given.
        label: how the row is called among those measured beside it; the model's name if empty.
        batch_size: images a call. It is never made smaller: what does not fit is an error in the row.
        img_size: side or (H, W) in pixels; the model's own if None.
        threads: CPU threads inside an operator; PyTorch's number if None.
        dtype: of weights and input, one of `DTYPES`; with int8 the input is float32, see `runtimes.with_file`.
        memory_format: of weights and input, one of `MEMORY_FORMATS`.
        runtime: one of `RUNTIMES`.
        mode: "infer", a forward pass, or "train", a forward and backward pass and a step of SGD.
        device: "cpu" or "cuda".
        attention: "matrix" makes timm's and our layers form the attention matrix instead of calling
            `scaled_dot_product_attention`.
        kwargs: constructor arguments.
        module: a model that is built already; it is copied, never changed.
        file: the ONNX file exported for this case, filled in by the benchmark.
    """

    model: str
    label: str = ""
    batch_size: int = 1
    img_size: ImgSize | None = None
    threads: int | None = None
    dtype: str = "float32"
    memory_format: str = "contiguous"
    runtime: str = "eager"
    mode: str = "infer"
    device: str = "cpu"
    attention: str = "default"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    file: Path | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name, value in (
            ("batch_size", self.batch_size),
            ("threads", self.threads),
            *_sides(self.img_size),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} {value} is not a positive integer")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; known: cpu, cuda, cuda:N")

    @property
    def name(self) -> str:
        """The label, or else the model."""
        return self.label or self.model

    @property
    def is_file(self) -> bool:
        """Whether the model is an ONNX file of the user's."""
        return self.module is None and self.model.endswith(".onnx")

    def check_model(self) -> None:
        """Find out before anything is measured whether there is such a model.

        Raises:
            UnknownModelError: no model of that name, with close matches.
            FileNotFoundError: no such ONNX file.
            ValueError: no such layer.
        """
        from vitzoo.benchmark.layers import LAYERS

        kind, colon, rest = self.model.partition(":")
        if self.module is not None:
            return
        if self.is_file:
            if not Path(self.model).is_file():
                raise FileNotFoundError(2, "there is no such ONNX file", self.model)
        elif colon and kind == "layer":
            if rest not in LAYERS:
                raise ValueError(f"unknown layer {rest!r}; known: {', '.join(LAYERS)}")
        else:
            check_name(rest if colon and kind == "timm" else self.model)


_CHOICES = {
    "dtype": DTYPES,
    "memory_format": MEMORY_FORMATS,
    "runtime": RUNTIMES,
    "mode": MODES,
    "attention": ATTENTIONS,
}


def _sides(size: Any) -> list[tuple[str, Any]]:
    return [("img_size", side) for side in (size if isinstance(size, (tuple, list)) else (size,))]


@dataclass(frozen=True)
class Measure:
    """How cases are measured; the same for all that are compared.

    Attributes:
        seconds: time spent on each case after its warm-up.
        min_rounds: rounds at least, however long they take.
        warmup_seconds: bound on the warm-up of each case; it ends before when times are stable.
        memory: measure peak memory, each case in a fresh process.
        isolate: give every case a process of its own for the timing too; rounds stay interleaved.
        passes: times that timing begins anew, from two on every time in fresh processes, among which `seconds` and
            `min_rounds` are divided. Intervals of ratios then know what differs from process to process.
        confidence: of the intervals of ratios.
    """

    seconds: float = 2.0
    min_rounds: int = 10
    warmup_seconds: float = 2.0
    memory: bool = True
    isolate: bool = False
    passes: int = 1
    confidence: float = 0.99

    def __post_init__(self) -> None:
        for name in ("seconds", "min_rounds", "passes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.warmup_seconds < 0:
            raise ValueError(f"warmup_seconds {self.warmup_seconds} is negative")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence {self.confidence} is not between 0 and 1")


Models = str | nn.Module | Sequence[str | nn.Module] | Mapping[str, str | nn.Module]


def subjects_of(models: Models) -> list[Case]:
    """Return a case with default settings for each model: names, modules, or label -> name or module."""
    if isinstance(models, Mapping):
        return [_subject(model, label) for label, model in models.items()]
    several: Iterable[str | nn.Module] = [models] if isinstance(models, (str, nn.Module)) else models
    return [_subject(model, "") for model in several]


def _subject(model: str | nn.Module, label: str) -> Case:
    if isinstance(model, nn.Module):
        return Case(type(model).__name__, label, module=model)
    return Case(model, label)


def sweep(subjects: Sequence[Case], **axes: Any) -> list[list[Case]]:
    """Return the groups of cases to be measured side by side: one for each combination of settings.

    Args:
        subjects: the models.
        axes: field of `Case` -> value, or list of values to sweep over. A tuple is one value, (H, W).

    Returns:
        Groups in the order of the axes, the last varying fastest; each holds every subject.
    """
    names = list(axes)
    values = [v if isinstance(v, list) else [v] for v in axes.values()]
    settings = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]
    return [[_with(subject, chosen) for subject in subjects] for chosen in settings]


def _with(subject: Case, chosen: Mapping[str, Any]) -> Case:
    chosen = dict(chosen)
    if subject.is_file and chosen.get("runtime", "eager") not in FILE_RUNTIMES:
        chosen["runtime"] = "onnxruntime"  # the one runtime a file has beside PyTorch's
    return replace(subject, **chosen)
