"""Models by name, for a size, a type and a layout; and what is known of one without running it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.models import get_model_input_config
from torch import nn

from vitzoo.benchmark.case import Case, ImgSize, Unsupported
from vitzoo.benchmark.flops import count_flops
from vitzoo.benchmark.layers import create_layer
from vitzoo.benchmark.runtimes import file_facts
from vitzoo.factory import create_model


def input_size(model: nn.Module, img_size: ImgSize | None = None) -> tuple[int, int, int]:
    """Return (C, H, W) of a model's input: its own, with another height and width if asked for."""
    channels, height, width = get_model_input_config(model)["input_size"]
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return channels, height, width


def create_for(name: str, img_size: ImgSize | None, **kwargs: Any) -> nn.Module:
    """Create a model for an input size; models that take any size have no such argument and need none."""
    make = timm.create_model if name.startswith("timm:") else create_model
    name = name.removeprefix("timm:")
    if img_size is None:
        return make(name, **kwargs)
    try:
        return make(name, **{"img_size": img_size, **kwargs})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return make(name, **kwargs)


def build(case: Case) -> nn.Module:
    """Return the case's model in its type and memory format, on the default device, in evaluation mode.

    Of an int8 case that is the float32 model that its file is quantized from.
    """
    with _attention(case.attention):
        if case.module is not None:
            model = copy.deepcopy(case.module)
        elif case.model.startswith("layer:"):
            model = create_layer(case.model.removeprefix("layer:"), **case.kwargs)
        else:
            model = create_for(case.model, case.img_size, **case.kwargs)
    model = model.eval()
    model = model.to(torch.float32 if case.dtype == "int8" else getattr(torch, case.dtype))
    if case.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model


@contextlib.contextmanager
def _attention(attention: str) -> Iterator[None]:
    """Let timm's and our layers be built with their own attention, or with the one that forms the matrix."""
    before, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    if attention == "matrix":
        set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(before, experimental)


def describe(case: Case) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Return what is known of a case without running it, and the size (C, H, W) of its input.

    The model is built on the meta device where it can be, so that counting costs neither time nor memory.

    Returns:
        Fields of a row: sizes, multiply-accumulates of one image's forward pass, operators not counted.

    Raises:
        Unsupported: an ONNX file that does not take the batch or image size asked for.
        Exception: whatever building the model or running it raises.
    """
    if case.is_file:
        return _describe_file(case)
    model = _on_meta(case)
    size = input_size(model, case.img_size)
    counted = count_flops(model, size)
    tensors = [*model.parameters(), *model.buffers()]
    facts = {
        "infer_gmacs": round(counted.gmacs, 4),
        "infer_gflops": round(counted.gflops, 4),
        "scan_gmacs": round(counted.by_kind.get("scan", 0.0), 4),
        "gmacs_by_kind": {kind: round(gmacs, 4) for kind, gmacs in counted.by_kind.items()},
        "uncounted_ops": counted.uncounted_ops,
        "param_count": round(counted.params / 1e6, 3),
        "weight_mib": round(sum(t.numel() * t.element_size() for t in tensors) / 2**20, 3),
    }
    return facts, size


def _on_meta(case: Case) -> nn.Module:
    if case.module is not None:
        return build(case)
    try:
        with torch.device("meta"):
            model = build(case)
        count_flops(model, input_size(model, case.img_size))
    except Exception:  # a model that reads values while it is built or run; a real fault shows again below
        return build(case)
    return model


def _describe_file(case: Case) -> tuple[dict[str, Any], Any]:
    from pathlib import Path

    facts = file_facts(Path(case.model))
    shape = facts.pop("input")
    if len(shape) != 4:
        raise Unsupported(f"{case.model} takes {len(shape)}-dimensional input, expected images (B, C, H, W)")
    asked = (case.batch_size, None, *_pair(case.img_size))
    for what, fixed, wanted in zip(("batch", "channels", "height", "width"), shape, asked, strict=True):
        if fixed is not None and wanted is not None and fixed != wanted:
            raise Unsupported(f"{case.model} has a fixed {what} of {fixed}, not {wanted}")
    size = [fixed or wanted for fixed, wanted in zip(shape[1:], (3, *asked[2:]), strict=True)]
    if None in size:
        raise Unsupported(f"{case.model} takes images of any size: name one with img_size")
    rounded = {key: round(value, 3) for key, value in facts.items()}
    return {**rounded, "infer_gmacs": None, "infer_gflops": None}, (size[0], size[1], size[2])


def _pair(size: ImgSize | None) -> tuple[int | None, int | None]:
    return (size, size) if size is None or isinstance(size, int) else size
