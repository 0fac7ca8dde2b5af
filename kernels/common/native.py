"""Loads the compiled extension vitzoo._C once, when an operator first asks, and keeps the reason if it cannot."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def why_not() -> str | None:
    """Return why the C++ extension cannot be used in this process, or None once its operators are registered."""
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


def cpu_isa() -> str | None:
    """Return the instruction set that the C++ kernels use here (baseline, avx2, avx512), None without them.

    Raises:
        RuntimeError: VITZOO_CPU_ISA names an instruction set that is unknown or that this CPU lacks.
    """
    if why_not() is not None:
        return None
    import torch

    return ("baseline", "avx2", "avx512")[torch.ops.vitzoo_native.cpu_isa()]
