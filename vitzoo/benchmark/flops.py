"""Count the multiply-accumulates of a forward pass, by module and by kind, and say what was not counted.

Formulas are PyTorch's own (`torch.utils.flop_counter`) where it has them. `flop_formulas` adds the operators
that it counts as zero (attention on CPU, integer products, matrix-vector products) and torchvision's
deformable convolution; our own operators register theirs beside their definition. `docs/flops.md` explains
the conventions.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vitzoo.benchmark.flop_formulas import SCAN_CONVENTIONS, Formula, counts_as_nothing, formulas, kind


@dataclass(frozen=True)
class FlopCount:
    """What one forward pass of a batch computes. MACs are multiply-accumulates; a FLOP count is twice that.

    Attributes:
        macs: multiply-accumulates.
        params: parameters of the model.
        input_size: (C, H, W).
        batch_size: images in the batch that all figures are for.
        scan_convention: "exact" or "paper", see `count_flops`.
        by_module: qualified module name -> GMACs, submodules included; what runs outside any submodule is in
            the total only.
        by_kind: "matmul" (a product with a weight), "integer matmul" (one of 8-bit codes), "attention" (a product
            of two activations), "conv", "deformable conv", "scan", "other" -> GMACs; only kinds that occur.
        by_operator: operator as it ran, "aten::addmm" or "vitzoo::selective_scan" -> GMACs; only those with any.
        uncounted_ops: operators that ran, have no formula and are not among those that count as nothing by
            convention (elementwise, reductions, norms, pooling, copies, gathers, sorting, resampling).
    """

    macs: int
    params: int
    input_size: tuple[int, int, int]
    batch_size: int = 1
    scan_convention: str = "exact"
    by_module: Mapping[str, float] = field(default_factory=dict)
    by_kind: Mapping[str, float] = field(default_factory=dict)
    by_operator: Mapping[str, float] = field(default_factory=dict)
    uncounted_ops: list[str] = field(default_factory=list)

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates in units of 1e9; what papers and timm's tables print, often as "FLOPs"."""
        return self.macs / 1e9

    @property
    def gflops(self) -> float:
        """Floating-point operations in units of 1e9: 2 x GMACs."""
        return 2 * self.gmacs

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as plain data."""
        return {
            "gmacs": self.gmacs,
            "gflops": self.gflops,
            "params": self.params,
            "input_size": list(self.input_size),
            "batch_size": self.batch_size,
            "scan_convention": self.scan_convention,
            "by_kind": dict(self.by_kind),
            "by_operator": dict(self.by_operator),
            "by_module": dict(self.by_module),
            "uncounted_ops": list(self.uncounted_ops),
        }


def count_flops(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
    scan_convention: str = "exact",
) -> FlopCount:
    """Count the multiply-accumulates of one forward pass in eval mode.

    The model runs once on zeros, on its own device and in its own dtype; a model on the meta device is
    counted without computing anything. It is left as it was: training flags restored, no hook stays, no
    statistic moves.

    Args:
        model: any module that takes one image tensor.
        input_size: (C, H, W) in pixels; None for the size the model was built for (timm's models say it), or
            (3, 224, 224).
        batch_size: images in the batch; the figures are for the whole batch.
        scan_convention: "exact" counts the operations of the sequential recurrence; "paper" takes 9*B*L*D*N
            (+ B*L*D for each of the skip and the gate) *as MACs*, which is what Mamba papers add to theirs,
            to compare with their tables.

    Returns:
        The counts.

    Raises:
        ValueError: an input size, a batch size or a convention that makes no sense.
        Exception: whatever the model raises for an input of that size.
    """
    size = _checked_size(get_model_input_config(model)["input_size"] if input_size is None else input_size)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not a positive integer")
    if scan_convention not in SCAN_CONVENTIONS:
        raise ValueError(f"unknown scan_convention {scan_convention!r}; known: {', '.join(SCAN_CONVENTIONS)}")
    model = getattr(model, "_orig_mod", model)  # a compiled graph hides its operators
    tensors = [*model.parameters(), *model.buffers()]
    counter = _Counter({_storage(t) for t in tensors} - {None}, formulas(scan_convention))
    first = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    x = torch.zeros(batch_size, *size, dtype=first.dtype, device=first.device)
    with torch.no_grad(), _evaluating(model), counter.following(model), counter:
        model(x)
    return FlopCount(
        macs=counter.flops[""] // 2,
        params=sum(p.numel() for p in model.parameters()),
        input_size=size,
        batch_size=batch_size,
        scan_convention=scan_convention,
        by_module={name: flops / 2e9 for name, flops in counter.flops.items() if name},
        by_kind={kind: flops / 2e9 for kind, flops in sorted(counter.kinds.items()) if flops},
        by_operator={name: flops / 2e9 for name, flops in sorted(counter.operators.items()) if flops},
        uncounted_ops=sorted(counter.uncounted),
    )


def _checked_size(input_size: Sequence[int]) -> tuple[int, int, int]:
    size = tuple(input_size)
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"input_size {size} is not three positive integers (C, H, W)")
    return size[0], size[1], size[2]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with nn's opaque attention kernels off, and every flag back after."""
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


class _Counter(TorchDispatchMode):
    """Adds up the formulas of every operator that reaches the device, under the modules that are running."""

    supports_higher_order_operators = True

    def __init__(self, weights: set[int | None], formulas: Mapping[Any, Formula]) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)  # by module, "" for the model itself
        self.kinds: dict[str, int] = defaultdict(int)
        self.operators: dict[str, int] = defaultdict(int)
        self.uncounted: set[str] = set()
        self._weights = weights
        self._formulas = formulas
        self._running: dict[str, int] = {}

    @contextlib.contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know at every moment which modules of the model are running."""
        running = self._running

        def enter(name: str) -> None:
            running[name] = running.get(name, 0) + 1

        def leave(name: str) -> None:
            running[name] -= 1
            if not running[name]:
                del running[name]

        with contextlib.ExitStack() as hooks:
            for name, module in model.named_modules():
                before = module.register_forward_pre_hook(lambda *_, name=name: enter(name))
                after = module.register_forward_hook(lambda *_, name=name: leave(name), always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        packet = func._overloadpacket
        formula = self._formulas.get(packet)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self._add(packet, args, formula(*args, **kwargs, out_val=out))
        elif not counts_as_nothing(func):
            self.uncounted.add(func._schema.name)
        return out

    def _higher_order(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """Count the body of a scan as often as it runs; name any other operator, whose inside is not seen."""
        if func is torch.ops.higher_order.scan:
            from torch._higher_order_ops.scan import generic_scan

            with self:
                return generic_scan(*args, **kwargs)
        self.uncounted.add(f"higher_order::{func.name()}")
        return func(*args, **kwargs)

    def _add(self, packet: Any, args: Any, flops: int) -> None:
        for name in self._running:
            self.flops[name] += flops
        self.operators[packet._qualified_op_name] += flops
        factors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        self.kinds[kind(packet, any(_storage(t) in self._weights for t in factors[-2:]))] += flops


def _storage(t: Tensor) -> int | None:
    """Return what identifies a tensor's memory, the same for its views; None if it has no plain memory."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
