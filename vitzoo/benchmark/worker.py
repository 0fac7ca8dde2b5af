"""Processes of their own for cases: `python -m vitzoo.benchmark.worker`, spoken to by `Worker` and `Nursery`.

Requests and answers are pickles over standard input and output. The child is ours, started by us: nothing from
elsewhere is unpickled. Whatever the model prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from vitzoo.benchmark.case import Case
from vitzoo.benchmark.memory import MIB, MemoryUnknownError, allocated, peak_of
from vitzoo.benchmark.subject import Subject, prepare

Size = tuple[int, int, int]


class WorkerError(RuntimeError):
    """What went wrong in a child, in its words.

    Attributes:
        kind: the class of the exception raised there.
        alive: whether the process is still there.
    """

    def __init__(self, kind: str, message: str, alive: bool = True) -> None:
        super().__init__(message)
        self.kind, self.alive = kind, alive


class _Child:
    """A child process and what is said to it."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (what it says on standard error, shown only if it dies)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vitzoo.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def ask(self, request: str, *arguments: Any) -> Any:
        """Return the answer to a request.

        Raises:
            WorkerError: it failed there, or the process died.
        """
        try:
            pickle.dump((request, arguments), self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
            good, answer = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError) as error:
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()
            raise WorkerError(*_death(self._process.wait(), said[-1:])) from error
        if not good:
            raise WorkerError(*answer)
        return answer

    def prepare(self, case: Case, size: Size) -> dict[str, Any]:
        """Have it build a case; returns the facts of `Subject`."""
        return self.ask("prepare", replace(case, module=None, kwargs=dict(case.kwargs)), _packed(case), size)

    def close(self) -> None:
        """End the process: the end of its requests is the end of its loop."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def _death(code: int, said: Sequence[str] = ()) -> tuple[str, str, bool]:
    """Return kind and message of the error that a process died of, and that it is dead."""
    if code == -signal.SIGKILL:
        why = "it was killed, as the system does when memory runs out"
        return "MemoryError", f"the process died: {why}", False
    return "WorkerError", ", ".join([f"the process died: exit code {code}", *said]), False


class Worker:
    """A child process that holds one case, with the interface of `Subject`.

    Attributes:
        facts: of the case, once it is prepared.
    """

    def __init__(self) -> None:
        self._child = _Child()
        self.facts: dict[str, Any] = {}

    def prepare(self, case: Case, size: Size) -> None:
        """Have it build a case.

        Args:
            case: what it is to hold.
            size: (C, H, W) of its input.

        Raises:
            WorkerError: building or running the case failed, or the process died.
        """
        self.facts = self._child.prepare(case, size)

    def block(self, calls: int) -> float:
        """Make calls in a row and return the mean seconds of one."""
        return self._child.ask("block", calls)

    def close(self) -> None:
        """End the process."""
        self._child.close()


class Nursery:
    """Measures the peak memory of cases, each in a fresh process.

    The processes are forks of one child that has imported everything and run nothing, so that only the first takes
    seconds to start. A context manager; the child starts with the first case.
    """

    def __init__(self) -> None:
        self._child: _Child | None = None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            self._child.close()

    def peak_memory(self, case: Case, size: Size) -> float:
        """Return the most MiB that a process holds during a call of the case, above what it held before.

        Raises:
            WorkerError: building or running the case failed, the process died, or the system does not say.
        """
        child = self._child = self._child or _Child()
        child.ask("fork")
        alive = True
        try:
            child.prepare(case, size)
            return child.ask("peak_memory")
        except WorkerError as error:
            alive = error.alive
            raise
        finally:
            if alive:
                child.ask("end")


def _packed(case: Case) -> bytes:
    """Pack the model of a case that brings one; the rest of a case is plain data."""
    if case.module is None:
        return b""
    buffer = io.BytesIO()
    torch.save(case.module, buffer)
    return buffer.getvalue()


class _Held:
    """What the child holds: the case, once prepared."""

    def __init__(self) -> None:
        self.subject: Subject | None = None
        self.device = "cpu"
        self.start: int | MemoryUnknownError = 0

    def prepare(self, case: Case, packed: bytes, size: Size) -> dict[str, Any]:
        self.device = case.device
        if case.threads is not None:
            torch.set_num_threads(case.threads)
        _preload(case)
        try:
            # the parcel is here already and goes away again once the model is out of it
            self.start = allocated(self.device) - (len(packed) if self.device == "cpu" else 0)
        except MemoryUnknownError as error:
            self.start = error
        if packed:
            case = replace(case, module=torch.load(io.BytesIO(packed), weights_only=False))
        self.subject = prepare(case, size)
        return self.subject.facts

    def block(self, calls: int) -> float:
        assert self.subject is not None
        return self.subject.block(calls)

    def peak_memory(self) -> float:
        assert self.subject is not None
        if isinstance(self.start, MemoryUnknownError):
            raise self.start
        return (peak_of(self.subject.work, self.device) - self.start) / MIB


def _preload(case: Case) -> None:
    """Load what any model would: libraries and thread pools are not the model's memory."""
    x = torch.randn(1, 8, 16, 16)
    with torch.inference_mode():
        y = torch.conv2d(x, torch.randn(8, 8, 3, 3)).flatten(2)
        torch.nn.functional.scaled_dot_product_attention(y, y, y) @ y.mT
    if case.runtime == "compiled":
        torch.compile(lambda t: t * 2 + 1)(x)
    elif case.runtime == "onnxruntime":
        import onnxruntime  # noqa: F401
    elif case.runtime == "openvino":
        from vitzoo.export.openvino import core

        core().get_property("CPU", "FULL_DEVICE_NAME")
    if case.device.startswith("cuda"):
        torch.cuda.init()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until they end."""
    held = _Held()
    known: dict[str, Callable[..., Any]] = {
        "prepare": held.prepare,
        "block": held.block,
        "peak_memory": held.peak_memory,
        "fork": lambda: None,
        "end": lambda: None,
    }
    while True:
        try:
            request, arguments = pickle.load(requests)
        except EOFError:
            return
        if request == "fork" and not _forked(answers):
            continue
        try:
            answer = (True, known[request](*arguments))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error)))
        _send(answer, answers)
        if request == "end":
            os._exit(0)


def _send(answer: tuple[bool, Any], answers: BinaryIO) -> None:
    pickle.dump(answer, answers)
    answers.flush()


def _forked(answers: BinaryIO) -> bool:
    """Return True in a fork, which answers from now on, and False here when it has ended."""
    child = os.fork()
    if child == 0:
        return True
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        _send((False, _death(code)), answers)
    return False


def main() -> None:
    """Serve the parent, whose Ctrl-C is for it alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
