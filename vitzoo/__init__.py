"""vitzoo: efficient vision backbones behind timm's create_model, on kernels that run everywhere.

Importing this package registers every model with timm. It loads neither Triton nor ONNX beyond what timm
itself loads, and touches no GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from vitzoo import kernels, layers, registry
from vitzoo._version import __version__
from vitzoo.checkpoint import CheckpointError
from vitzoo.factory import create_model
from vitzoo.kernels.common.backends import use_backend
from vitzoo.registry import CATEGORIES, UnknownModelError, list_models, model_info

if TYPE_CHECKING:
    from vitzoo.benchmark.flops import count_flops
    from vitzoo.benchmark.run import benchmark
    from vitzoo.deploy import export_model, export_quantized, lower_int8, quantize, validate
    from vitzoo.export import export_onnx, export_openvino, export_program
    from vitzoo.quantization.convert import convert_int8

__all__ = [
    "CATEGORIES",
    "CheckpointError",
    "UnknownModelError",
    "__version__",
    "benchmark",
    "convert_int8",
    "count_flops",
    "create_model",
    "export_model",
    "export_onnx",
    "export_openvino",
    "export_program",
    "export_quantized",
    "kernels",
    "layers",
    "list_models",
    "lower_int8",
    "model_info",
    "quantize",
    "registry",
    "validate",
]

_LAZY = {
    "convert_int8": "vitzoo.quantization.convert",
    "count_flops": "vitzoo.benchmark.flops",
    "export_model": "vitzoo.deploy",
    "export_onnx": "vitzoo.export",
    "export_openvino": "vitzoo.export",
    "export_program": "vitzoo.export",
    "export_quantized": "vitzoo.deploy",
    "lower_int8": "vitzoo.deploy",
    "quantize": "vitzoo.deploy",
    "validate": "vitzoo.deploy",
}


def __getattr__(name: str) -> Any:
    if name == "benchmark":  # a package that can be called
        return importlib.import_module("vitzoo.benchmark")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitzoo' has no attribute {name!r}")


def _publish_operators() -> None:
    """Put every operator's public functions on vitzoo.kernels, a namespace package without __init__.py.

    A folder and its function share a name; once the folder is imported, setting the function in its place is
    final.
    """
    for entry in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"vitzoo.kernels.{entry.name}")
        for name in getattr(module, "__all__", ()):
            setattr(kernels, name, getattr(module, name))
    kernels.use_backend = use_backend  # type: ignore[attr-defined]


_publish_operators()
