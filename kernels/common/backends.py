"""How an operator chooses among its implementations.

An operator lists its backends, best first. Each says in words why it cannot take a call; the first without a reason
runs. `use_backend` forces one by name, and a forced backend that cannot run is an error, never a silent fallback. The
plain PyTorch reference takes what no other backend can, with one warning a process.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

NAMES = ("cuda", "triton", "cpu", "reference")

_forced: ContextVar[str | None] = ContextVar("vitzoo_backend", default=None)
_record: ContextVar[dict[str, set[str]] | None] = ContextVar("vitzoo_backend_record", default=None)
_warned = False
operators: dict[str, Operator] = {}


class BackendError(RuntimeError):
    """No backend can take a call, or the forced one cannot; the message gives every reason."""


class SlowBackendWarning(UserWarning):
    """An operator runs in plain torch ops; the message says why, and what to do."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: one of `NAMES`.
        run: the functions of the operator by pass, e.g. {"forward": ..., "backward": ...}.
        why_not: called with the operator's arguments, returns None or the reason, a sentence without full stop, why it
            cannot take them. Called with none, it judges the machine alone (`vitzoo doctor`).
    """

    name: str
    run: dict[str, Callable[..., Any]]
    why_not: Callable[..., str | None]


@dataclass(frozen=True)
class Operator:
    """An operator's name and its backends, best first; it enters `operators` when made."""

    name: str
    backends: tuple[Backend, ...] = field(default=())

    def __post_init__(self) -> None:
        operators[self.name] = self

    def choose(self, *args: Any, **kwargs: Any) -> Backend:
        """Return the backend that runs this call, with a warning where that is the reference for want of a better one.

        Raises:
            BackendError: the forced backend cannot take it, or none can.
        """
        forced = _forced.get()
        reasons: list[str] = []
        if forced is None and args and getattr(args[0], "is_cpu", False):
            # what stands before "cpu" takes CPU tensors only when it is forced
            for backend in self.backends:
                if backend.name == "cpu" and backend.why_not(*args, **kwargs) is None:
                    return self._recorded(backend)
        for backend in self.backends:
            if forced is not None and backend.name != forced:
                continue
            reason = backend.why_not(*args, **kwargs)
            if reason is None:
                if backend.name == "reference" and reasons:
                    _warn_once(self.name, reasons)
                return self._recorded(backend)
            reasons.append(f"{backend.name}: {reason}")
        if forced is not None and not reasons:
            reasons = [
                f"{forced}: this operator has no such backend, only {', '.join(b.name for b in self.backends)}"
            ]
        start = f"backend {forced!r} was asked for but cannot" if forced else "no backend can"
        raise BackendError(f"{start} run {self.name}: {'; '.join(reasons)}")

    def _recorded(self, backend: Backend) -> Backend:
        if (record := _record.get()) is not None:
            record.setdefault(self.name, set()).add(backend.name)
        return backend


def _warn_once(name: str, reasons: list[str]) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"vitzoo runs {name} in plain torch ops, which is right but slow ({'; '.join(reasons)}). "
            "This is said once; `vitzoo doctor` lists every backend.",
            SlowBackendWarning,
            stacklevel=2,
        )


def forced_backend() -> str | None:
    """Return the backend that `use_backend` forces here, or None."""
    return _forced.get()


@contextlib.contextmanager
def record_backends() -> Iterator[dict[str, set[str]]]:
    """Give a dictionary that fills with operator -> backends chosen for the calls made inside the block."""
    record: dict[str, set[str]] = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every operator called inside the block, and for the backward pass of what is called there.

    Args:
        name: one of `NAMES`; None lets each operator choose again.

    Raises:
        ValueError: an unknown name.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
