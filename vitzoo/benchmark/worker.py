"""Processes of their own for cases: a `Nursery` is `python -m vitzoo.benchmark.worker`, its forks are `Worker`.

Requests and answers are pickles over a socket of each worker. The processes are ours, started by us: nothing from
elsewhere is unpickled. Whatever the model prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Any, BinaryIO, NoReturn

import torch

from vitzoo.benchmark.case import Case
from vitzoo.benchmark.memory import MIB, MemoryUnknownError, allocated, peak_of
from vitzoo.benchmark.subject import Subject, prepare

Size = tuple[int, int, int]
# to a nursery: fork, or wait for the fork of this number; the answer is the number, or its exit code
FORK, LONGEST = b"fork", 64


class WorkerError(RuntimeError):
    """What went wrong in a worker, in its words.

    Attributes:
        kind: the class of the exception raised there.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Nursery:
    """A process that has imported everything and run nothing; its forks hold cases.

    So only the first case waits the seconds that importing takes. What a process has for good, such as where its
    libraries lie, is the same in all forks of a nursery, and differs from that of another one; multiprocessing's fork
    server, one a program, would not do, and runs the caller's main module again. A context manager; the process starts
    with the first fork.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (shown only if it dies)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait()
        self._said.close()

    def fork(self, requests: socket.socket, said: IO[bytes]) -> int:
        """Fork a process that answers requests.

        Args:
            requests: its end of a connection.
            said: file for what it says on standard output and error.

        Returns:
            Its number.
        """
        if self._control is None:
            self._control = self._start()
        socket.send_fds(self._control, [FORK], [requests.fileno(), said.fileno()])
        return int(self._answer())

    def wait(self, number: int) -> int:
        """Return the exit code of a fork that ends."""
        assert self._control is not None
        self._control.sendall(str(number).encode())
        return int(self._answer())

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vitzoo.benchmark.worker"],
            stdin=theirs.fileno(),
            stdout=self._said,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": paths},
        )
        theirs.close()
        return ours

    def _answer(self) -> bytes:
        assert self._control is not None
        answer = self._control.recv(LONGEST)
        if not answer:
            what = ["the process that forks others died", *_last_line(self._said)]
            raise WorkerError("WorkerError", ", ".join(what))
        return answer

    def peak_memory(self, case: Case, size: Size) -> float:
        """Return the most MiB that a fork holds during a call of the case, above what it held before.

        Raises:
            WorkerError: building or running the case failed, the process died, or the system does not say.
        """
        worker = Worker(self)
        try:
            worker.prepare(case, size)
            return worker.peak_memory()
        finally:
            worker.close()


class Worker:
    """A fork of a nursery that holds one case, with the interface of `Subject`.

    Args:
        nursery: whose.

    Attributes:
        facts: of the case, once it is prepared.
    """

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (shown only if it dies)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._number: int | None = nursery.fork(theirs, self._said)
            self._stream = ours.makefile("rwb")
        self.facts: dict[str, Any] = {}

    def prepare(self, case: Case, size: Size) -> None:
        """Have it build a case.

        Args:
            case: what it is to hold.
            size: (C, H, W) of its input.

        Raises:
            WorkerError: building or running the case failed, or the process died.
        """
        case, packed = replace(case, module=None, kwargs=dict(case.kwargs)), _packed(case)
        self.facts = self._ask("prepare", case, packed, size)

    def block(self, calls: int) -> float:
        """Make calls in a row and return the mean seconds of one."""
        return self._ask("block", calls)

    def peak_memory(self) -> float:
        """Return the most MiB that the process held during a call, above what it held before the model was built."""
        return self._ask("peak_memory")

    def close(self) -> None:
        """End the process, which has nothing to save."""
        with contextlib.suppress(OSError):
            self._stream.close()
        if self._number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._number, signal.SIGKILL)
            self._wait()
        self._said.close()

    def _ask(self, request: str, *arguments: Any) -> Any:
        """Return the answer to a request.

        Raises:
            WorkerError: it failed there, or the process died.
        """
        try:
            pickle.dump((request, arguments), self._stream)
            self._stream.flush()
            good, answer = pickle.load(self._stream)
        except (EOFError, OSError) as error:
            raise self._death() from error
        if not good:
            raise WorkerError(*answer)
        return answer

    def _wait(self) -> int:
        """Return the exit code, and forget the number, which another process may get."""
        assert self._number is not None
        number, self._number = self._number, None
        return self._nursery.wait(number)

    def _death(self) -> WorkerError:
        if self._number is None:
            return WorkerError("WorkerError", "the process has died before")
        code = self._wait()
        if code == -signal.SIGKILL:
            why = "it was killed, as the system does when memory runs out"
            return WorkerError("MemoryError", f"the process died: {why}")
        what = [f"the process died: exit code {code}", *_last_line(self._said)]
        return WorkerError("WorkerError", ", ".join(what))


def _last_line(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return said.read().decode(errors="replace").strip().splitlines()[-1:]


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


def serve(stream: BinaryIO | io.BufferedRWPair) -> None:
    """Answer requests until they end."""
    held = _Held()
    known: dict[str, Callable[..., Any]] = {
        "prepare": held.prepare,
        "block": held.block,
        "peak_memory": held.peak_memory,
    }
    while True:
        try:
            request, arguments = pickle.load(stream)
        except EOFError:
            return
        try:
            answer = (True, known[request](*arguments))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error)))
        pickle.dump(answer, stream)
        stream.flush()


def raise_workers(control: socket.socket) -> None:
    """Fork and wait as requests ask, until they end."""
    while True:
        message, handles, _, _ = socket.recv_fds(control, LONGEST, 2)
        if not message:
            return
        if message != FORK:
            answer = os.waitstatus_to_exitcode(os.waitpid(int(message), 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                control.close()
                _work(*handles)
            for handle in handles:
                os.close(handle)
        control.sendall(str(answer).encode())


def _work(requests: int, said: int) -> NoReturn:
    """Be a worker, to the end of the process."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    with socket.socket(fileno=requests) as connection:
        serve(connection.makefile("rwb"))
    os._exit(0)


def main() -> None:
    """Raise workers for the parent, whose Ctrl-C is for it alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_workers(socket.socket(fileno=0))


if __name__ == "__main__":
    main()
