"""Measuring: `vitzoo.benchmark(...)` runs a benchmark; FLOPs, time and memory are in the modules. Loaded on demand.

The package is callable, so that the function and the package can share a name: `vitzoo.benchmark(...)` is
`vitzoo.benchmark.run.benchmark(...)`, which see for the arguments.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This module, callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from vitzoo.benchmark.run import benchmark

        return benchmark(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
