"""Layer-wise relevance propagation: how much each layer carries of what the network predicts.

The rules of Chefer et al. are written as gradients: inside `relevance_rules()` every operation's backward pass hands
its output's relevance to its inputs, so that `torch.autograd.grad(logits, tensors, one_hot)` returns relevances. It
works on any model of torch operations. Relevances are ratios with small denominators: run in float64.

Source: H. Chefer, S. Gur, L. Wolf, "Transformer Interpretability Beyond Attention Visualization" (arXiv 2012.09838),
equations 5 to 10; rules as in hila-chefer/Transformer-Explainability c3e578f7.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitzoo.kernels.common.backends import operators

_LEAST = 1e-9


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b with the denominator kept away from 0, and 0 where b is 0."""
    shifted = b + _LEAST
    return a / torch.where(shifted == 0, _LEAST, shifted) * (b != 0)


class _Rule(torch.autograd.Function):
    """A function whose backward pass is a rule: (relevance of the output, output, inputs) -> relevances."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], rule: Callable[..., Any], *inputs: Tensor
    ) -> Tensor:
        ctx.function, ctx.rule = function, rule
        out = function(*inputs)
        ctx.save_for_backward(out, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        out, *inputs = ctx.saved_tensors
        return None, None, *ctx.rule(relevance[0], ctx.function, out, *inputs)


def _products(
    relevance: Tensor, function: Callable[..., Tensor], out: Tensor, *inputs: Tensor
) -> list[Tensor]:
    """Return x dout/dx . (R / out) for each input."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        gradients = torch.autograd.grad(function(*leaves), leaves, _divide(relevance, out))
    return [x * gradient for x, gradient in zip(inputs, gradients, strict=True)]


def _identity(relevance: Tensor, function: Any, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [relevance]


def _halves(relevance: Tensor, function: Any, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [part / 2 for part in _products(relevance, function, out, *inputs)]


def _sums(relevance: Tensor, function: Any, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Share the relevance of a sum: by value within a branch, by the branches' own totals between them."""

    def total(x: Tensor) -> Tensor:
        # each image by itself; a branch without the batch axis (a position table) is one for all
        return x.sum(tuple(range(1, x.ndim)), keepdim=True) if x.ndim == out.ndim else x.sum()

    parts = _products(relevance, function, out, *inputs)
    totals = [total(part) for part in parts]
    whole = total(relevance)
    every = totals[0].abs() + totals[1].abs()
    shared = [
        part * _divide(_divide(t.abs(), every) * whole, t) for part, t in zip(parts, totals, strict=True)
    ]
    return [x if x.shape == i.shape else x.sum_to_size(i.shape) for x, i in zip(shared, inputs, strict=True)]


def _positive(apply: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Return the alpha = 1 rule of a linear map: what raises the output carries the relevance."""

    def rule(relevance: Tensor, function: Any, out: Tensor, x: Tensor, weight: Tensor) -> list[Tensor | None]:
        pairs = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
        ratio = _divide(relevance, apply(*pairs[0]) + apply(*pairs[1]))
        shares = []
        for part, w in pairs:
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(apply(leaf, w), leaf, ratio)
            shares.append(part * gradient)
        return [shares[0] + shares[1], None]

    return rule


_ACTIVATIONS = {
    F.softmax, torch.softmax, Tensor.softmax, F.gelu, F.silu, F.relu, torch.relu, Tensor.relu, F.layer_norm, F.dropout,
    F.hardswish, F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.softplus, F.batch_norm, F.group_norm, F.rms_norm,
    torch.exp, Tensor.exp,
}  # fmt: skip
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_SCALINGS = {
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    torch.div,
    Tensor.div,
    Tensor.__truediv__,
}
_POOLINGS = {torch.mean, Tensor.mean, torch.sum, Tensor.sum, F.avg_pool2d, F.adaptive_avg_pool2d}


class _Rules(TorchFunctionMode):
    """Replaces each operation by one that propagates relevance; what moves elements keeps its own gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False  # the rule of what wrote the input still needs it
        reference = _reference_of(func)
        if reference is not None:
            with self:  # the rules hold for the torch operations that an operator of ours stands for
                return reference(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in (F.conv2d, torch.conv2d, F.conv1d, torch.conv1d):
            return _convolution(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _ACTIVATIONS:
            x, *rest = args
            return _Rule.apply(lambda t: func(t, *rest, **kwargs), _identity, x)
        if func in _POOLINGS:
            x, *rest = args
            return _Rule.apply(lambda t: func(t, *rest, **kwargs), _products, x)
        if func in _PRODUCTS | _ADDITIONS | _SCALINGS:
            return _binary(func, *args, **kwargs)
        return func(*args, **kwargs)


def _reference_of(func: Any) -> Callable[..., Any] | None:
    """Return an operator of vitzoo in torch operations, None for any other function."""
    name = getattr(func, "_qualified_op_name", "") or getattr(func, "_name", "")
    if not str(name).startswith("vitzoo::"):
        return None
    return operators[str(name).removeprefix("vitzoo::").partition(".")[0]].backends[-1].run["forward"]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    def apply(a: Tensor, w: Tensor) -> Tensor:
        return F.linear(a, w)

    return _Rule.apply(lambda a, w: F.linear(a, w, bias), _positive(apply), x, weight)


def _convolution(
    func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
) -> Tensor:
    def apply(a: Tensor, w: Tensor) -> Tensor:
        return func(a, w, None, *args, **kw)

    return _Rule.apply(lambda a, w: func(a, w, bias, *args, **kw), _positive(apply), x, weight)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **kwargs: Any
) -> Tensor:
    scale = kwargs.get("scale") or 1 / math.sqrt(q.shape[-1])
    scores = _binary(torch.matmul, _binary(torch.mul, q, scale), k.transpose(-2, -1))
    if attn_mask is not None:
        scores = _Rule.apply(lambda s: s + attn_mask, _identity, scores)
    probs = _Rule.apply(lambda s: s.softmax(-1), _identity, scores)
    return _binary(torch.matmul, probs, v)


def _binary(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """Apply a sum or product; one with a constant, a scale say, hands relevance on as it is."""

    def varies(x: Any) -> bool:
        return isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter)

    if varies(a) and varies(b):
        rule = _sums if func in _ADDITIONS else _halves
        return _Rule.apply(lambda s, t: func(s, t, **kwargs), rule, a, b)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and func in _ADDITIONS and (varies(a) or varies(b)):
        return _Rule.apply(lambda s, t: func(s, t, **kwargs), _sums, a, b)
    if varies(a):
        return _Rule.apply(lambda s: func(s, b, **kwargs), _identity, a)
    if varies(b):
        return _Rule.apply(lambda t: func(a, t, **kwargs), _identity, b)
    return func(a, b, **kwargs)


@contextlib.contextmanager
def relevance_rules() -> Iterator[None]:
    """Make every operation called inside the block propagate relevance in its backward pass."""
    with _Rules():
        yield


def _capture(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Any]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = (inputs[0], output)

        return hook

    return found, [modules[name].register_forward_hook(keep(name)) for name in names]


def layer_relevance(
    model: nn.Module, x: Tensor, names: Iterable[str], target: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the relevance of a class at the input and the output of layers.

    Args:
        model: in eval mode; float64 is advised. It takes one batch and returns logits (B, classes).
        x: images, (B, 3, H, W).
        names: of the layers, as in `model.named_modules()`.
        target: classes, (B,); default the predicted ones.

    Returns:
        name -> (relevance of the layer's input, of its output), each of that tensor's shape.

    Raises:
        ValueError: a name that the model does not have.
    """
    names = list(names)
    unknown = sorted(set(names) - {name for name, _ in model.named_modules()})
    if unknown:
        raise ValueError(f"the model has no layer {', '.join(unknown)}")
    found, handles = _capture(model, names)
    try:
        with torch.enable_grad(), relevance_rules():
            logits = model(x.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    target = logits.argmax(1) if target is None else target
    one_hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    tensors = [tensor for pair in found.values() for tensor in pair]
    relevances = torch.autograd.grad(logits, tensors, one_hot)
    return {name: (relevances[2 * i], relevances[2 * i + 1]) for i, name in enumerate(found)}


def contribution_scores(
    model: nn.Module, batches: Iterable[Tensor], names: Iterable[str]
) -> dict[str, float]:
    """Return each layer's share of the relevance, the mean over images of sum|R| at its output, normalised to sum 1.

    Args:
        model: see `layer_relevance`; a float64 copy is advised.
        batches: of images.
        names: of the layers.

    Source: LRP-QViT (arXiv 2401.11243) for the idea; the normalisation is ours, since the paper's could not be read.
    """
    names = list(names)
    sums = dict.fromkeys(names, 0.0)
    for x in batches:
        for name, (_, out) in layer_relevance(model, x, names).items():
            sums[name] += float(out.abs().sum())
    total = sum(sums.values())
    if not total > 0:
        raise ValueError(
            "no relevance reaches any of the layers; is the model in eval mode and differentiable?"
        )
    return {name: value / total for name, value in sums.items()}
