"""Registers an operator with PyTorch's dispatcher from one description.

An operator `vitzoo::<op>` and its backward pass `vitzoo::<op>_bwd` get their schemas here, in Python, so that they
exist without the compiled extension; each has one implementation for every device, which picks the backend at run
time, inside the operator: compiled graphs stay whole. Fake tensors, autograd, autocast and FLOP formulas are registered
along with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitzoo.kernels.common.backends import Operator, forced_backend, use_backend
from vitzoo.kernels.common.eager import direct

_LIBRARY = torch.library.Library("vitzoo", "FRAGMENT")
# operator -> FLOPs in the convention of the scan papers' tables, from the inputs with tensors as shapes
paper_formulas: dict[Any, Callable[..., int]] = {}
_KEPT: ContextVar[bool | tuple[str, ...]] = ContextVar("kept", default=False)


@contextlib.contextmanager
def keep_operators(*names: str) -> Iterator[None]:
    """Leave operators whole in graphs that torch.export traces meanwhile: they then run on our kernels, with vitzoo.

    Args:
        names: of the operators; none means every one.
    """
    token = _KEPT.set(names or True)
    try:
        yield
    finally:
        _KEPT.reset(token)


def exporting(name: str = "") -> bool:
    """Return whether the call is being traced for export, where an operator decomposes into torch operations."""
    kept = _KEPT.get()
    if kept is True or (kept and name in kept):
        return False
    # torch 2.11 answers yes to is_exporting() under torch.compile too, where the operator itself belongs
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def register(
    operator: Operator,
    inputs: str,
    outputs: tuple[str, ...],
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backward_flops: Callable[..., int] | None = None,
    paper_flops: Callable[..., int] | None = None,
    saved: tuple[str, ...] = (),
    constant: tuple[str, ...] = (),
    no_gradient: tuple[str, ...] = (),
    autocast_wide: tuple[str, ...] = (),
    autocast_cast: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Register `vitzoo::<name>` and, with a gradient, `vitzoo::<name>_bwd`; return what calls the forward operator.

    A backend's run["forward"](*inputs) returns the outputs: a tensor, or a tuple where there are two or more. Its
    run["backward"](*douts, *saved outputs, *inputs) returns the gradients of the differentiable tensor inputs, in
    order, None for absent ones; dout of the first differentiable output is always a tensor, the others may be None.
    Outputs are made contiguous and gradients cast to their input's dtype here. A call whose first input has no
    elements goes to the reference.

    Args:
        operator: its name and backends.
        inputs: the schema's arguments in order, e.g. "Tensor x, Tensor? bias, int groups".
        outputs: names of the outputs, all tensors.
        fake: called as the forward pass, returns empty tensors of its shapes; checks only what the public function,
            which sees shapes first, does not.
        flops: called with the inputs, tensors as shapes, returns the FLOPs (2 x MACs) of the forward pass.
        backward_flops: likewise with douts, saved outputs and inputs; None means the operator has no gradient, and a
            backward pass through it is an error.
        paper_flops: like `flops`, in the convention of the scan papers' tables where that differs.
        saved: outputs that the backward pass reads.
        constant: tensor inputs without a gradient (indices, integer weights).
        no_gradient: outputs that cannot be differentiated (indices, statistics).
        autocast_wide: inputs that autocast brings to at least float32.
        autocast_cast: inputs that autocast casts to its dtype. The operator stays below autocast in any case.
    """
    name, run = operator.name, _forward(operator, len(outputs))
    _LIBRARY.define(_schema(name, inputs, len(outputs)), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitzoo::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.vitzoo, name)
    register_flop_formula(packet)(_formula(packet, flops))
    if paper_flops is not None:
        paper_formulas[packet] = _formula(packet, paper_flops)
    if backward_flops is not None:
        _Backward(operator, inputs, outputs, saved, constant, no_gradient).register(backward_flops)
    else:
        torch.library.register_autograd(f"vitzoo::{name}", _no_gradient(name), lib=_LIBRARY)
    if autocast_wide or autocast_cast:
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _register_autocast(packet, device, key, autocast_wide, autocast_cast)
    return direct(packet, run)


def _schema(name: str, inputs: str, count: int) -> str:
    returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return f"{name}({inputs}) -> {returns}"


def _arguments(packet: Any) -> list[Any]:
    return list(packet.default._schema.arguments)


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _chosen(operator: Operator, first: Tensor, *args: Any) -> Any:
    if first.numel() == 0:
        return next(backend for backend in operator.backends if backend.name == "reference")
    return operator.choose(*args)


def _forward(operator: Operator, count: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        results = _as_tuple(_chosen(operator, args[0], *args).run["forward"](*args))
        # an output may not be an input or a view of one
        tensors = tuple(r.clone() if any(r is a for a in args) else r.contiguous() for r in results)
        return tensors[0] if count == 1 else tensors

    return run


def _formula(packet: Any, flops: Callable[..., int]) -> Callable[..., int]:
    """Return a formula that fills defaults in: the dispatcher leaves arguments equal to their default out."""
    defaults = [a.default_value if a.has_default_value() else None for a in _arguments(packet)]

    def formula(*args: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(*args, *defaults[len(args) :])

    return formula


def _no_gradient(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{name} has no gradient; call it under torch.no_grad() or detach its inputs")

    return refuse


class _Backward:
    """The backward operator of one forward operator, and the autograd rule that joins them."""

    def __init__(
        self,
        operator: Operator,
        inputs: str,
        outputs: tuple[str, ...],
        saved: tuple[str, ...],
        constant: tuple[str, ...],
        no_gradient: tuple[str, ...],
    ) -> None:
        self.operator, self.outputs, self.saved = operator, outputs, saved
        self.differentiable = [i for i, out in enumerate(outputs) if out not in no_gradient]
        self.first = len(self.differentiable) + len(saved)  # where the inputs start
        packet = getattr(torch.ops.vitzoo, operator.name)
        arguments = _arguments(packet)
        self.tensors = [i for i, a in enumerate(arguments) if _is_tensor(a)]
        self.wanted = [i for i in self.tensors if arguments[i].name not in constant]
        douts = [f"Tensor{'?' if k else ''} d{outputs[i]}" for k, i in enumerate(self.differentiable)]
        kept = [f"Tensor {out}" for out in saved]
        self.schema = _schema(
            f"{operator.name}_bwd", ", ".join([*douts, *kept, inputs]), max(1, len(self.wanted))
        )

    def register(self, flops: Callable[..., int]) -> None:
        name = f"{self.operator.name}_bwd"
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vitzoo::{name}", self.fake, lib=_LIBRARY)
        torch.library.register_autograd(
            f"vitzoo::{self.operator.name}", self.differentiate, setup_context=self.save, lib=_LIBRARY
        )
        torch.library.register_autograd(f"vitzoo::{name}", self.refuse, lib=_LIBRARY)
        packet = getattr(torch.ops.vitzoo, name)
        register_flop_formula(packet)(_formula(packet, flops))
        self.call = direct(packet, self.run)

    def _results(self, gradients: list[Tensor]) -> Any:
        return gradients[0] if len(self.wanted) == 1 else tuple(gradients)

    def run(self, *args: Any) -> Any:
        inputs = args[self.first :]
        wanted = [inputs[i] for i in self.wanted]
        if inputs[0].numel() == 0:
            gradients: list[Any] = [None if x is None else torch.zeros_like(x) for x in wanted]
        else:
            backend = self.operator.choose(*inputs)
            gradients = list(_as_tuple(backend.run["backward"](*args)))
        return self._results(
            [
                inputs[0].new_empty(0) if x is None else _gradient(g, x, args)
                for g, x in zip(gradients, wanted, strict=True)
            ]
        )

    def fake(self, *args: Any) -> Any:
        inputs = args[self.first :]
        return self._results(
            [
                inputs[0].new_empty(0) if inputs[i] is None else inputs[i].new_empty(inputs[i].shape)
                for i in self.wanted
            ]
        )

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = _as_tuple(output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(outputs[self.outputs.index(name)] for name in self.saved), *(inputs[i] for i in self.tensors)
        )
        ctx.others = [None if i in self.tensors else value for i, value in enumerate(inputs)]
        first = outputs[self.differentiable[0]]
        ctx.zero = (first.shape, first.dtype, first.device)
        ctx.backend = forced_backend()  # the engine may run the backward pass in a thread of its own

    def differentiate(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        douts = [gradients[i] for i in self.differentiable]
        if all(dout is None for dout in douts):
            return (None,) * len(ctx.others)
        if douts[0] is None:
            shape, dtype, device = ctx.zero
            douts[0] = torch.zeros(shape, dtype=dtype, device=device)
        kept = ctx.saved_tensors  # once: checkpointing forbids a second reading
        saved, tensors = kept[: len(self.saved)], kept[len(self.saved) :]
        inputs = list(ctx.others)
        for i, tensor in zip(self.tensors, tensors, strict=True):
            inputs[i] = tensor
        with use_backend(ctx.backend or forced_backend()):
            results = self.call(*douts, *saved, *inputs)
        out: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(self.wanted, _as_tuple(results), strict=True):
            out[i] = None if inputs[i] is None else gradient
        return tuple(out)

    def refuse(self, ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{self.operator.name} can be differentiated once only; its backward pass has no gradient of its own"
        )


def _gradient(gradient: Tensor, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    gradient = gradient.to(x.dtype).contiguous()
    return gradient.clone() if any(gradient is a for a in args) else gradient


def _register_autocast(
    packet: Any, device: str, key: str, wide: tuple[str, ...], cast: tuple[str, ...]
) -> None:
    """Cast named inputs alone: torch.library.register_autocast casts every input to one dtype."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    names = [argument.name for argument in _arguments(packet)]

    def prepare(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if name in wide:
            return value.to(torch.promote_types(value.dtype, torch.float32))
        if name in cast and value.dtype != torch.float64:
            return value.to(torch.get_autocast_dtype(device))
        return value

    def autocast(*args: Any) -> Any:
        prepared = [prepare(name, value) for name, value in zip(names, args, strict=False)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return packet(*prepared)

    _LIBRARY.impl(packet._qualified_op_name.split("::")[1], autocast, key)


def backward_by_autograd(
    reference: Callable[..., Any],
    inputs: tuple[Any, ...],
    douts: tuple[Tensor | None, ...],
    wanted: tuple[int, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `inputs[i]` for i in `wanted`, by autograd through the reference.

    Args:
        reference: the operator in differentiable torch operations.
        inputs: its arguments.
        douts: gradients of its leading outputs; None for an output that the loss does not read.
        wanted: positions of tensor inputs, None among them allowed.
    """
    leaves = [
        x.detach().requires_grad_() if i in wanted and isinstance(x, Tensor) else x
        for i, x in enumerate(inputs)
    ]
    with contextlib.ExitStack() as stack:
        # the dispatcher comes here below autograd
        stack.enter_context(torch.enable_grad())
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        outputs = _as_tuple(reference(*leaves))
    pairs = [(out, dout) for out, dout in zip(outputs, douts, strict=False) if dout is not None]
    present = [leaves[i] for i in wanted if leaves[i] is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], present, [dout.to(out.dtype) for out, dout in pairs], allow_unused=True
        )
    )
    gradients = []
    for i in wanted:
        gradient = None if leaves[i] is None else next(found)
        gradients.append(
            torch.zeros_like(inputs[i]) if gradient is None and leaves[i] is not None else gradient
        )
    return tuple(gradients)
