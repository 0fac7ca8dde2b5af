"""Loads the compiled extensions once, when an operator first asks, and keeps the reason if it cannot.

vitzoo._C holds the CPU kernels and the host form of the CUDA kernels, vitzoo._C_cuda the CUDA kernels themselves. With
VITZOO_CUDA_ON_CPU=1 in the environment `use_backend("cuda")` runs the host form on CPU tensors: the same kernel bodies,
thread by thread, which is for tests.
"""

from __future__ import annotations

import functools
import importlib
import os

import torch
from torch import Tensor

from vitzoo.kernels.common.backends import forced_backend

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _stale(extension: str, lacking: list[str]) -> str | None:
    if not lacking:
        return None
    return (
        f"the {extension} extension was built from older sources and lacks {', '.join(lacking)}: "
        "run `make build` in a checkout, or reinstall with pip's --no-build-isolation"
    )


@functools.cache
def _load_error() -> str | None:
    try:
        importlib.import_module("vitzoo._C")
    except ModuleNotFoundError as error:
        if error.name != "vitzoo._C":
            return f"the C++ extension does not load ({error})"
        return (
            "the C++ extension was not built: a C++ compiler, Python's headers and torch were not all there at "
            "install; with them, reinstall with pip's --no-build-isolation"
        )
    except ImportError as error:
        return f"the C++ extension does not load ({error})"
    return None


@functools.cache
def why_not(*names: str) -> str | None:
    """Return why the C++ extension cannot be used in this process, or None once its operators are registered.

    Args:
        names: operators of `torch.ops.vitzoo_native` that the caller needs; an extension built from older sources may
            lack some.
    """
    if (error := _load_error()) is not None:
        return error
    return _stale("C++", [name for name in names if not hasattr(torch.ops.vitzoo_native, name)])


def cpu_why_not(name: str, x: Tensor | None, *names: str) -> str | None:
    """Return why C++ kernels for the CPU, of floating-point tensors, cannot take a call, or None.

    Args:
        name: of the call's first tensor, as the caller knows it.
        x: that tensor; None asks about the machine alone.
        names: operators of `torch.ops.vitzoo_native` that the caller needs.
    """
    if x is not None:
        if x.device.type != "cpu":
            return f"it runs on the CPU only and {name} is on {x.device}"
        if x.dtype not in CPU_DTYPES:
            return f"{name} is {x.dtype}, not float32, float64, bfloat16 or float16"
    return why_not(*names)


def cpu_isa() -> str | None:
    """Return the instruction set that the C++ kernels use here (baseline, avx2, avx512), None without them.

    Raises:
        RuntimeError: VITZOO_CPU_ISA names an instruction set that is unknown or that this CPU lacks.
    """
    if why_not("cpu_isa") is not None:
        return None
    return ("baseline", "avx2", "avx512")[torch.ops.vitzoo_native.cpu_isa()]


def cuda_on_cpu() -> bool:
    """Return whether `use_backend("cuda")` runs CUDA kernels in their host form on CPU tensors."""
    return os.environ.get("VITZOO_CUDA_ON_CPU", "0") == "1"


@functools.cache
def _cuda_load_error() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        importlib.import_module("vitzoo._C_cuda")
    except ModuleNotFoundError as error:
        if error.name != "vitzoo._C_cuda":
            return f"the CUDA extension does not load ({error})"
        return (
            f"the CUDA extension was not built: there was no nvcc of CUDA {torch.version.cuda} at install; "
            "with it, reinstall with pip's --no-build-isolation"
        )
    except ImportError as error:
        return f"the CUDA extension does not load ({error})"
    return None


@functools.cache
def cuda_extension_why_not(*names: str) -> str | None:
    """Return why the CUDA extension cannot be loaded, whether or not there is a GPU, or None once it is.

    Args:
        names: operators of `torch.ops.vitzoo_native` of which the caller needs the CUDA form.
    """
    if (error := why_not(*names) or _cuda_load_error()) is not None:
        return error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return _stale("CUDA", [name for name in names if not has_kernel(f"vitzoo_native::{name}", "CUDA")])


@functools.cache
def _no_gpu(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU is sm_{major}{minor}, the CUDA kernels are built for sm_80 and later"
    return None


def cuda_why_not(x: Tensor | None, *names: str) -> str | None:
    """Return why CUDA kernels cannot run here or on `x`, a sentence without full stop, or None.

    Args:
        x: the call's first input; None asks about the machine alone.
        names: operators of `torch.ops.vitzoo_native` that the caller needs.
    """
    if x is None:
        return why_not(*names) if cuda_on_cpu() else _no_gpu(None) or cuda_extension_why_not(*names)
    if x.device.type == "cuda":
        return _no_gpu(x.device.index) or cuda_extension_why_not(*names)
    if x.device.type != "cpu":
        return f"it runs on CUDA devices only and the input is on {x.device}"
    if not cuda_on_cpu():
        return "it runs on CUDA devices only and the input is on the CPU"
    if forced_backend() != "cuda":
        return "on the CPU it runs in its host form, only when use_backend('cuda') asks for it"
    return why_not(*names)


def cpu_vnni() -> bool:
    """Return whether the C++ kernels use the 8-bit dot product here (VNNI, with vectors of `cpu_isa`'s width).

    Raises:
        RuntimeError: as `cpu_isa`.
    """
    if why_not("cpu_vnni") is not None:
        return False
    return bool(torch.ops.vitzoo_native.cpu_vnni())
