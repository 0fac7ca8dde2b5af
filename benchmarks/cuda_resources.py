"""Record what every CUDA kernel takes of a multiprocessor: registers, spills, stack, static shared memory.

    python benchmarks/cuda_resources.py --output benchmarks/results/cuda_resources.json

Compiles csrc/*/*.cu with nvcc for every architecture of setup.py and reads what ptxas says; needs no GPU. Exits with an
error where a kernel spills, unless --allow-spills is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import CUDA_HOME, include_paths

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {
    "registers": r"Used (\d+) registers",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "shared_bytes": r"(\d+) bytes smem",
}


def arches() -> list[int]:
    """Return the compute capabilities that setup.py builds for."""
    found = re.search(r"^CUDA_ARCHES = \(([\d, ]+)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py does not name CUDA_ARCHES")
    return [int(arch) for arch in found[1].split(",")]


def ptxas_log(source: Path) -> str:
    """Return what ptxas says while nvcc compiles a file for every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            os.path.join(CUDA_HOME or "", "bin", "nvcc"),
            *("-c", str(source), "-o", os.path.join(folder, "kernel.o"), "-O3", "-std=c++20", "-w"),
            *("-Xptxas=-v", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-Xcompiler=-fPIC"),
            *(f"-I{path}" for path in include_paths()),
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches()),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source}: nvcc failed\n{done.stderr[-4000:]}")
    return done.stderr


def readable(mangled: str) -> str:
    """Return the kernel's own name and template arguments, e.g. SelectiveScanForward<8>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(r"kernel_entry<vitzoo::(.+), vitzoo::\w+>\(", name)
    return found[1].replace("vitzoo::", "") if found else name


def kernels(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return kernel -> architecture -> numbers."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        entry = re.match(r"'(\S+)' for '(\S+)'", part)
        if entry is None:
            raise SystemExit(f"cannot read what ptxas says: {part[:200]}")
        numbers = {key: re.search(pattern, part) for key, pattern in NUMBERS.items()}
        found.setdefault(readable(entry[1]), {})[entry[2]] = {
            key: int(match[1]) if match else 0 for key, match in numbers.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--allow-spills", action="store_true")
    options = parser.parse_args()
    nvcc = [os.path.join(CUDA_HOME or "", "bin", "nvcc"), "--version"]
    version = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = {"nvcc": version.strip().splitlines()[-2], "files": {}}
    spilling = []
    for source in sorted(ROOT.glob("csrc/*/*.cu")):
        found = kernels(ptxas_log(source))
        result["files"][str(source.relative_to(ROOT))] = found
        for kernel, numbers in found.items():
            print(
                f"{kernel:48s}",
                *(f"{arch} {n['registers']}" for arch, n in sorted(numbers.items())),
                *("spills" for n in numbers.values() if n["spill_store_bytes"]),
            )
            spilling += [kernel for n in numbers.values() if n["spill_store_bytes"]]
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    if spilling and not options.allow_spills:
        sys.exit(f"registers spill in {', '.join(sorted(set(spilling)))}")


if __name__ == "__main__":
    main()
