"""Memory of this process, and the most that a piece of work takes: resident set on the CPU, allocator on CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryUnknownError(RuntimeError):
    """This system does not tell what is asked."""


def _status(field: str) -> int:
    """Return a field of the process's status in bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        raise MemoryUnknownError(
            f"{sys.platform} has no {_STATUS}: peak memory is measured on Linux"
        ) from error
    raise MemoryUnknownError(f"{_STATUS} has no {field}")


def allocated(device: str) -> int:
    """Return the bytes that this process holds: resident on the CPU, given out by the allocator on CUDA.

    Pages of files are left out: code of libraries is not the model's memory, and comes in as it is first used.

    Raises:
        MemoryUnknownError: the system does not say.
    """
    gc.collect()
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    # what was freed but not given back would hide behind the next allocation
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") - _file_pages()


def _file_pages() -> int:
    """Return the resident bytes that are pages of files: code of libraries, loaded as it is first used."""
    try:
        return _status("RssFile")
    except MemoryUnknownError:
        return 0


def peak_of(work: Callable[[], Any], device: str) -> int:
    """Run a piece of work and return the most bytes that the process held meanwhile.

    Raises:
        MemoryUnknownError: the system does not say.
    """
    before = allocated(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        _CLEAR.write_text("5")  # the high-water mark starts anew at what is resident now
    except OSError as error:
        raise MemoryUnknownError(f"{_CLEAR} cannot be written ({error.strerror})") from error
    work()
    return max(before, _status("VmHWM") - _file_pages())
