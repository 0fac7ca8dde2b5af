"""What the Triton backends share: whether Triton can run here, its interpreter, and compiling ahead of time.

Triton is imported on use only. With TRITON_INTERPRET=1 in the environment its kernels run on CPU tensors in its
interpreter, which is for tests: it must be asked for by `use_backend("triton")`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitzoo.kernels.common.backends import Backend, forced_backend


def interpreting() -> bool:
    """Return whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 0):
        return f"the GPU is sm_{major}{minor}, Triton needs sm_70 or later"
    return None


def why_not(x: Tensor | None = None, *args: Any) -> str | None:
    """Return why Triton kernels cannot run here or on `x`, a sentence without full stop, or None."""
    if _missing() is not None:
        return _missing()
    if x is None:
        return _only_when_asked() if interpreting() else _no_gpu()
    if x.device.type == "cuda":
        return "TRITON_INTERPRET=1 is set, which is for CPU tensors" if interpreting() else _no_gpu()
    if x.device.type != "cpu":
        return f"it runs on CUDA devices only and the input is on {x.device}"
    if not interpreting():
        return "it runs on CUDA devices only and the input is on the CPU"
    return _only_when_asked()


def _only_when_asked() -> str | None:
    if forced_backend() == "triton":
        return None
    return "on the CPU it runs in Triton's interpreter, only when use_backend('triton') asks for it"


def lazily(folder: str, function: str) -> Callable[..., Any]:
    """Return a function of an operator's Triton file, which is imported at the first call."""

    def run(*args: Any) -> Any:
        module = importlib.import_module(f"vitzoo.kernels.{folder}.triton_impl")
        return getattr(module, function)(*args)

    return run


def narrow_why_not(name: str) -> Callable[..., str | None]:
    """Return the `why_not` of kernels that sum in float32: their first argument, `name`, may not be wider."""

    def check(x: Tensor | None = None, *args: Any) -> str | None:
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {x.dtype}, not float32, bfloat16 or float16: the Triton kernels sum in float32"
        return why_not(x)

    return check


def backend(
    folder: str,
    why_not: Callable[..., str | None],
    forward: str = "forward",
    backward: str | None = "backward",
) -> Backend:
    """Return the Triton backend of an operator.

    Args:
        folder: of the operator, which has a `triton_impl.py`.
        why_not: of the backend.
        forward: name of the forward pass in that file.
        backward: name of the backward pass, None where there is none.
    """
    run = {"forward": lazily(folder, forward)} | ({"backward": lazily(folder, backward)} if backward else {})
    return Backend("triton", run, why_not)


def compile_ahead(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], capability: int, num_warps: int = 4
) -> Any:
    """Compile a kernel to a cubin without a GPU; return Triton's compiled kernel.

    Args:
        kernel: the jitted function (not an autotuned or interpreted one).
        signature: type of every argument: "*fp32", "i32", "fp32", or "constexpr".
        constexprs: value of every constexpr argument.
        capability: 80 for sm_80, 90 for sm_90.
        num_warps: warps a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
