"""A case made ready to be called, in this process: its model, its input, its step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.benchmark.case import Case
from vitzoo.benchmark.models import build
from vitzoo.benchmark.runtimes import difference_from_eager, open_file
from vitzoo.benchmark.timing import run_block
from vitzoo.kernels.common.backends import record_backends

Work = Callable[[], Any]


@dataclass
class Subject:
    """A case ready to be timed.

    Attributes:
        work: one call, a batch.
        facts: fields of a row that show only when it runs.
    """

    work: Work
    facts: dict[str, Any] = field(default_factory=dict)

    def block(self, calls: int) -> float:
        """Make calls in a row and return the mean seconds of one."""
        return run_block(self.work, calls)

    def close(self) -> None:
        """Let the model go."""
        del self.work


def make_input(case: Case, size: tuple[int, int, int]) -> Tensor:
    """Return normally distributed images of a fixed seed, (B, C, H, W), in the case's type, layout and place."""
    x = torch.randn(case.batch_size, *size, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format
    return x.to(
        case.device, torch.float32 if case.dtype == "int8" else getattr(torch, case.dtype)
    ).contiguous(memory_format=layout)


def prepare(case: Case, size: tuple[int, int, int]) -> Subject:
    """Build a case and call it once.

    Args:
        case: with its `file` where the runtime reads one.
        size: (C, H, W) of the input.

    Returns:
        The subject; its facts hold the backend that each of our operators used, the seconds of the first call where
        it compiles, and how far an exported file's output is from eager PyTorch's.

    Raises:
        Exception: whatever building or running the model raises, as when memory does not suffice.
    """
    torch.manual_seed(0)
    x = make_input(case, size)
    facts: dict[str, Any] = {}
    if case.file is not None:
        run, array = open_file(case), x.numpy()
        facts["difference_from_eager"] = difference_from_eager(case, run)
        work: Work = functools.partial(run, array)
    else:
        model = build(case).to(case.device)
        call: Any = torch.compile(model) if case.runtime == "compiled" else model
        work = _step(model, call, x) if case.mode == "train" else _forward(call, x)
    start = time.perf_counter()
    with record_backends() as used:
        work()
    seconds = time.perf_counter() - start
    facts["backends"] = {op: sorted(names) for op, names in sorted(used.items())}
    if case.runtime == "compiled":
        facts["compile_seconds"] = round(seconds, 3)
    return Subject(work, facts)


def _forward(model: Callable[[Tensor], Any], x: Tensor) -> Work:
    def forward() -> Any:
        with torch.inference_mode():
            return model(x)

    return forward


def _step(model: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> Work:
    """Return a training step: forward, backward, SGD; cross-entropy where the model classifies."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        _loss(call(x)).backward()
        optimizer.step()

    return step


def _loss(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        if out.ndim == 2:
            targets = torch.arange(len(out), device=out.device) % out.shape[1]
            return F.cross_entropy(out.float(), targets)
        return out.float().mean()
    parts = [_loss(part) for part in (out.values() if isinstance(out, dict) else out)]
    return torch.stack([part.float() for part in parts]).sum()
