"""`vitzoo doctor`: versions, processor, and what each operator will run on here, or why not the better one."""

from __future__ import annotations

import shutil
from typing import Any

from vitzoo.benchmark.machine import machine, version
from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import operators

# package -> (what needs it, the line that installs it)
OPTIONAL = {
    "onnx": ("export to ONNX", "pip install 'vitzoo[onnx]'"),
    "onnxscript": ("export to ONNX", "pip install 'vitzoo[onnx]'"),
    "onnxruntime": ("checking and running exported files", "pip install 'vitzoo[onnx]'"),
    "openvino": ("`vitzoo bench --runtime openvino`", "pip install 'vitzoo[openvino]'"),
    "scikit-learn": ("the demo's photographs", "pip install 'vitzoo[demo]'"),
    "jinja2": ("the demo's and the report's page", "pip install 'vitzoo[report]'"),
    "plotly": ("`vitzoo report`'s page", "pip install 'vitzoo[report]'"),
    "matplotlib": ("`vitzoo report --png`", "pip install 'vitzoo[report]'"),
    "textalloc": ("`vitzoo report --png`", "pip install 'vitzoo[report]'"),
    "fvcore": ("the tests that compare FLOP counters", "pip install 'vitzoo[test]'"),
}


def operator_report() -> list[dict[str, Any]]:
    """Return one entry an operator: its name, the backend that runs here, and each backend's reason if it cannot.

    A reason of None means that the backend is available; the first available one runs unless a call's
    arguments ask too much of it.
    """
    report = []
    for name, operator in sorted(operators.items()):
        reasons = {backend.name: backend.why_not() for backend in operator.backends}
        runs = next((backend for backend, reason in reasons.items() if reason is None), None)
        report.append({"operator": name, "runs": runs, "backends": reasons})
    return report


def diagnose() -> dict[str, Any]:
    """Return what `vitzoo doctor` prints.

    Returns:
        `machine` (see `vitzoo.benchmark.machine`), `extension` (loaded, why not, instruction set),
        `operators` (see `operator_report`), `packages` (version or None, what it is for, how to get it),
        `compiler`.
    """
    reason = native.why_not()
    return {
        "machine": machine(),
        "extension": {"loaded": reason is None, "why_not": reason, "isa": native.cpu_isa()},
        "operators": operator_report(),
        "packages": {
            name: {"version": version(name), "for": purpose, "install": install}
            for name, (purpose, install) in OPTIONAL.items()
        },
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    }
