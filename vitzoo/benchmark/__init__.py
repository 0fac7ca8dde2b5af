"""Measuring: `vitzoo.benchmark(...)` runs a benchmark; FLOPs, time and memory are in the modules. Loaded on demand.

The package is callable, so that the function and the package can share a name: `vitzoo.benchmark(...)` is
`vitzoo.benchmark.run.benchmark(...)`, which see for the arguments. `vitzoo.benchmark.report(...)` is that of
`vitzoo.benchmark.reporting`.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitzoo.benchmark.reporting import report

__all__ = ["report"]


class _Callable(types.ModuleType):
    """This module, callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from vitzoo.benchmark.run import benchmark

        return benchmark(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "report":
        from vitzoo.benchmark.reporting import report

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Callable
