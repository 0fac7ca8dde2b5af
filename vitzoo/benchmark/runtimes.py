"""Runtimes other than PyTorch's own: each turns an ONNX file and an input into something to call."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.benchmark.case import FILE_RUNTIMES, INT8_RUNTIMES, Case, Unsupported
from vitzoo.benchmark.machine import this_machine

CALIBRATION_IMAGES = 8
Run = Callable[[Any], list[Any]]
INSTALL = {"onnxruntime": "pip install 'vitzoo[onnx]'", "openvino": "pip install 'vitzoo[openvino]'"}


def require(runtime: str) -> None:
    """Find out whether a runtime's package is there.

    Raises:
        ImportError: it is not; the message has the line that installs it.
    """
    if runtime in INSTALL and importlib.util.find_spec(runtime) is None:
        raise ImportError(f"runtime {runtime} is not installed here: {INSTALL[runtime]}")


def check(case: Case) -> None:
    """Find out whether a case can be run by its runtime.

    Raises:
        Unsupported: a combination that no runtime here takes.
        ImportError: a missing package, with the line that installs it.
    """
    if case.dtype == "int8" and (case.runtime not in INT8_RUNTIMES or case.is_file):
        raise Unsupported(
            f"int8 is measured of models that are quantized here for runtime {', '.join(INT8_RUNTIMES)}, not "
            + (f"of {case.model}" if case.is_file else f"for runtime {case.runtime}")
        )
    if case.runtime in FILE_RUNTIMES:
        wrong = {
            "mode": case.mode != "infer",
            "device": case.device != "cpu",
            "dtype": case.dtype not in ("float32", "int8"),
            "memory_format": case.memory_format != "contiguous",
        }
        for name, bad in wrong.items():
            if bad:
                value = getattr(case, name)
                raise Unsupported(
                    f"runtime {case.runtime} is measured in float32 inference on the CPU, not {value}"
                )
    elif case.is_file:
        raise Unsupported(
            f"{case.model} is an ONNX file: runtime is {' or '.join(FILE_RUNTIMES)}, not {case.runtime}"
        )
    require(case.runtime)


def with_file(case: Case, build: Callable[[Case], nn.Module], size: Sequence[int], folder: Path) -> Case:
    """Return the case with the ONNX file that its runtime reads; a model without one yet is exported to the folder.

    Of an int8 case the file is quantized by the recipe "w8a8" for this machine. What it is calibrated on, a few random
    images, is good for its speed; nothing is said about its accuracy.
    """
    if case.runtime not in FILE_RUNTIMES:
        return case
    if case.is_file:
        return replace(case, file=Path(case.model).resolve())
    from vitzoo.export import export_onnx
    from vitzoo.export.quantized import export_int8

    # the batch is dynamic: one file serves every batch size, number of threads and runtime of a sweep
    of_model = (case.model, id(case.module), case.attention, sorted(case.kwargs.items(), key=str))
    same = (*of_model, tuple(size), case.dtype)
    path = folder / f"{hashlib.sha256(repr(same).encode()).hexdigest()[:16]}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        model = build(case)
        if case.dtype == "int8":
            images = torch.randn(CALIBRATION_IMAGES, *size, generator=torch.Generator().manual_seed(1))
            export_int8(model, path, images, this_machine())
        else:
            export_onnx(model, path, tuple(size), check=False)
        x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.save({"x": x, "out": _first(model(x))}, _expected(path))
    return replace(case, file=path, module=None)


def _expected(path: Path) -> Path:
    return path.with_suffix(".pt")


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values() if isinstance(out, dict) else out))
    return out.clone()


def open_file(case: Case) -> Run:
    """Open the case's ONNX file in its runtime: a function from images (B, C, H, W), float32, to outputs."""
    assert case.file is not None, "with_file comes first"
    threads = case.threads or torch.get_num_threads()
    return (_onnxruntime if case.runtime == "onnxruntime" else _openvino)(case.file, threads)


def difference_from_eager(case: Case, run: Run) -> float | None:
    """Return norm(out - eager) / norm(eager) of a file that was exported here, None of a user's file."""
    if case.file is None or not _expected(case.file).exists():
        return None
    from vitzoo.testing import relative_difference

    expected = torch.load(_expected(case.file), weights_only=True)
    return relative_difference(torch.from_numpy(run(expected["x"].numpy())[0]), expected["out"])


def _onnxruntime(path: Path, threads: int) -> Run:
    from vitzoo.export.check import open_session

    session = open_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def _openvino(path: Path, threads: int) -> Run:
    from vitzoo.export.openvino import open_openvino

    run = open_openvino(path, threads)
    return lambda array: [out.numpy() for out in run(torch.from_numpy(array))]


def file_mib(path: Path) -> float:
    """Return the size of an ONNX file in MiB, with the file of weights beside it where there is one."""
    files = [path, *(data for data in [path.with_name(path.name + ".data")] if data.exists())]
    return sum(file.stat().st_size for file in files) / 2**20


def file_facts(path: Path) -> dict[str, Any]:
    """Return what is known of an ONNX file without running it: its size, parameters and input.

    Returns:
        `weight_mib`, `param_count` in millions, and `input`, its input's shape with None where it is free.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    constant = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constant]
    shape = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim]
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) > 0)
    return {"weight_mib": file_mib(path), "param_count": parameters / 1e6, "input": shape}
