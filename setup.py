"""Packages, and the optional compiled extension. Everything else is in pyproject.toml.

The extension vitzoo._C is built where a C++ compiler, Python's headers and torch are at hand; without them the install
is pure Python and complete. VITZOO_NO_NATIVE=1 skips it on request.
"""

from __future__ import annotations

from setuptools import find_packages, setup

packages = [
    *find_packages(include=["vitzoo", "vitzoo.*"], exclude=["vitzoo.kernels", "vitzoo.kernels.*"]),
    "vitzoo.kernels",
    *(f"vitzoo.kernels.{name}" for name in find_packages("kernels")),
]

setup(
    packages=packages,
    package_dir={"vitzoo": "vitzoo", "vitzoo.kernels": "kernels"},
    package_data={"vitzoo": ["py.typed"]},
)
