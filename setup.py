"""Packages, and the optional compiled extension. Everything else is in pyproject.toml.

The extension vitzoo._C is built where a C++ compiler, Python's headers and torch are at hand; without them the install
is pure Python and complete. VITZOO_NO_NATIVE=1 skips it on request. It uses only the limited API of Python 3.11 and the
stable ABI of torch 2.11, so one wheel serves every later version of both.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

packages = [
    *find_packages(include=["vitzoo", "vitzoo.*"], exclude=["vitzoo.kernels", "vitzoo.kernels.*"]),
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
    "-Wno-maybe-uninitialized",  # a false positive in GCC 12's own AVX-512 header
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


def extension() -> dict[str, Any]:
    """Return setup()'s arguments for vitzoo._C, or none where it cannot be built."""
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
    module = Extension(
        "vitzoo._C",
        sources=sorted(["csrc/module.cpp", *glob("csrc/*/*.cpp")]),
        depends=sorted(glob("csrc/*/*.h")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
        extra_compile_args=COMPILE_ARGS,
        py_limited_api=True,
        language="c++",
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    packages=packages,
    package_dir={"vitzoo": "vitzoo", "vitzoo.kernels": "kernels"},
    package_data={"vitzoo": ["py.typed"], "vitzoo.demo": ["*.j2"]},
    **extension(),
)
