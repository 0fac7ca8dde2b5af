"""What a measurement depends on besides the code: processor, threads, versions, commit, load."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from vitzoo._version import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)
# the instruction sets that kernels of PyTorch, of ONNX Runtime or of ours choose between
ISA_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "sve",
    "i8mm",
    "bf16",
)


def version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return package -> version of what is installed, Python and vitzoo included."""
    found = {name: number for name in PACKAGES if (number := version(name))}
    return {"python": platform.python_version(), "vitzoo": __version__, **found}


def cpu() -> dict[str, Any]:
    """Return the processor's model name, its instruction sets, its cores and PyTorch's threads."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [flag for flag in ISA_FLAGS if flag in present],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, Any]]:
    """Return name, compute capability and memory in MiB of each CUDA device."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_mib": p.total_memory // 2**20}
        for p in found
    ]


def commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+" if files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def this_machine() -> str:
    """Return the target of `vitzoo.export.quantized` that this machine is."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm"
    return "x86-vnni" if {"avx512_vnni", "avx_vnni"} & {*cpu()["flags"]} else "x86-avx2"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Return the record that goes with every result."""
    return {
        "cpu": cpu(),
        "gpus": gpus(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
