"""Packages, and the optional compiled extensions. Everything else is in pyproject.toml.

The extension vitzoo._C is built where a C++ compiler, Python's headers and torch are at hand; without them the install
is pure Python and complete. VITZOO_NO_NATIVE=1 skips it on request. It uses only the limited API of Python 3.11 and the
stable ABI of torch 2.11, so one wheel serves every later version of both.

vitzoo._C_cuda holds the CUDA kernels. It is built in addition where nvcc is at hand, of the CUDA version that torch was
built with; VITZOO_NO_CUDA=1 skips it. Its machine code is for CUDA_ARCHES, and PTX of the last serves later GPUs.
VITZOO_SANITIZE=address,undefined builds vitzoo._C alone, with GCC's sanitizers (`make test-asan`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

packages = [
    *find_packages(include=["vitzoo", "vitzoo.*"], exclude=["vitzoo.kernels", "vitzoo.kernels.*"]),
    "vitzoo.benchmark.suites",  # data alone, as the recipes
    "vitzoo.quantization.recipes",
    "vitzoo.kernels",
    *(f"vitzoo.kernels.{name}" for name in find_packages("kernels")),
]

TORCH_2_11 = "0x020b000000000000"
COMPILE_ARGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information, ten times the size
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-unknown-pragmas",  # nvcc's, in the CUDA kernels' host form
    "-Wno-maybe-uninitialized",  # a false positive in GCC 12's own AVX-512 header
]
# compute capabilities with machine code of their own: A100; RTX 30; RTX 40, L4; H100
CUDA_ARCHES = (80, 86, 89, 90)
NVCC_ARGS = [
    "-O3",
    "-std=c++20",
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHES),
    f"-gencode=arch=compute_{CUDA_ARCHES[-1]},code=compute_{CUDA_ARCHES[-1]}",
    "--threads=2",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fvisibility=hidden,-g0",
    "-diag-suppress=20012,20013,20014,20015",  # torch's own headers: constexpr host functions called on the device
]


def why_no_extension() -> str | None:
    """Return why the extension cannot be built here, or None."""
    if os.environ.get("VITZOO_NO_NATIVE", "0") not in ("", "0"):
        return "VITZOO_NO_NATIVE is set"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        return f"there is no C++ compiler ({compiler})"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        return f"Python's headers are not installed ({header})"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the building environment (install with --no-build-isolation)"
    return None


def why_no_cuda() -> str | None:
    """Return why the CUDA extension cannot be built here, given that the C++ one can, or None."""
    if os.environ.get("VITZOO_NO_CUDA", "0") not in ("", "0"):
        return "VITZOO_NO_CUDA is set"
    if os.environ.get("VITZOO_SANITIZE"):
        return "VITZOO_SANITIZE is set"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return "there is no nvcc (set CUDA_HOME)"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of an unknown version"
        return f"nvcc is {found} and torch was built with CUDA {torch.version.cuda}"
    return None


def cuda_libraries() -> list[str]:
    """Return where nvcc's own toolkit has its libraries; nvcc on the path may be a script that calls another."""
    from torch.utils.cpp_extension import CUDA_HOME

    dry = [Path(CUDA_HOME, "bin", "nvcc"), "--dryrun", "-x", "cu", "/dev/null", "-c", "-o", "/dev/null"]
    told = subprocess.run(dry, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    roots = [Path(CUDA_HOME), *([Path(top[1].strip()).resolve()] if top else [])]
    return [str(root / name) for root in roots for name in ("lib64", "lib") if (root / name).is_dir()]


def cuda_extension() -> list[Extension]:
    """Return vitzoo._C_cuda, or nothing where it cannot be built."""
    reason = why_no_cuda()
    if reason is not None:
        print(f"vitzoo: building without the CUDA extension, since {reason}.")
        return []
    from torch.utils.cpp_extension import include_paths, library_paths

    return [
        Extension(
            "vitzoo._C_cuda",
            sources=sorted(["csrc/module_cuda.cpp", *glob("csrc/*/*.cu")]),
            depends=sorted([*glob("csrc/*/*.h"), *glob("csrc/*/*.cuh")]),
            include_dirs=include_paths("cuda"),
            library_dirs=[*library_paths(), *cuda_libraries()],
            # the runtime is torch's own, already loaded by the time this is imported
            libraries=["torch", "torch_cpu", "torch_cuda", "c10", "cudart"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11), ("USE_CUDA", None)],
            extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
            py_limited_api=True,
            language="c++",
        )
    ]


def extension() -> dict[str, Any]:
    """Return setup()'s arguments for the compiled extensions, or none where they cannot be built."""
    reason = why_no_extension()
    if reason is not None:
        print(f"vitzoo: building without the C++ extension, since {reason}; the operators run in torch ops.")
        return {}
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    if (
        "CXX" not in os.environ
        and shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None
    ):
        os.environ["CXX"] = "c++"
    sanitizers = os.environ.get("VITZOO_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"] if sanitizers else []
    module = Extension(
        "vitzoo._C",
        sources=sorted(["csrc/module.cpp", *glob("csrc/*/*.cpp")]),
        depends=sorted([*glob("csrc/*/*.h"), *glob("csrc/*/*.cuh")]),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
        extra_compile_args=[*COMPILE_ARGS, *sanitize, *(["-O1", "-g1"] if sanitize else [])],
        extra_link_args=sanitize,
        py_limited_api=True,
        language="c++",
    )
    return {
        "ext_modules": [module, *cuda_extension()],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    packages=packages,
    package_dir={"vitzoo": "vitzoo", "vitzoo.kernels": "kernels"},
    package_data={
        "vitzoo": ["py.typed"],
        "vitzoo.benchmark.reporting": ["*.j2", "*.js"],
        "vitzoo.benchmark.suites": ["*.toml"],
        "vitzoo.demo": ["*.j2"],
        "vitzoo.quantization.recipes": ["*.toml"],
    },
    **extension(),
)
