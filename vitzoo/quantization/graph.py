"""The model as a graph of torch operations: where the products are, what feeds them, what they see.

Quantization works on the exported graph, not on modules, so that every family is served by one implementation: the same
linear layers, convolutions and attention products appear in each. The graph's batch is dynamic, its weights keep their
names, attention is spelled out, BatchNorm is folded into the layer before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitzoo.kernels.common.registration import keep_operators
from vitzoo.layers.attention import PlainAttention

aten = torch.ops.aten
# spelled out its tokens' states, N numbers a channel each, would all be in memory, and eager runs a step at a time
SCAN = "bidirectional_selective_scan"

# operations that keep every element: quantizing before one is quantizing behind it
REARRANGES = {
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.contiguous.default, aten.clone.default, aten.unsqueeze.default, aten.squeeze.dim,
}  # fmt: skip
# operations that only move elements: what is true of their input's origin is true of theirs
_MOVES = REARRANGES | {aten.slice.Tensor, aten.select.int, aten.to.dtype, aten.type_as.default}
_ORIGINS = {
    aten.layer_norm.default: "norm",
    aten.softmax.int: "softmax",
    aten.gelu.default: "gelu",
}


@dataclass(frozen=True)
class Site:
    """A product that can be quantized.

    Attributes:
        name: the layer's name in the model, `blocks.0.attn.qkv`; an attention product has the name of its module and
            `.scores` (q k^T) or `.mix` (probabilities times v).
        kind: "linear", "conv" or "product".
        node: name of the graph's node.
        operands: names of the nodes that it multiplies; the activation alone where the other factor is a weight.
        origins: what each operand comes from: "norm", "softmax", "gelu" or "".
        weight: name of the weight, None for a product of activations.
        macs: multiply-accumulates an image.
        result: name of the node that holds the output: `node`, or the ReLU or ReLU6 that alone reads it.
        pointwise: a convolution that is a linear layer of the channels: 1 x 1, one group, no stride or padding.
    """

    name: str
    kind: str
    node: str
    operands: tuple[str, ...]
    origins: tuple[str, ...]
    weight: str | None
    macs: int
    result: str
    pointwise: bool = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)
            yield
    finally:
        logger.setLevel(level)


def capture(model: nn.Module, x: Tensor, whole: bool = False) -> fx.GraphModule:
    """Return the model as a graph with a dynamic batch, in evaluation mode, weights copied.

    Args:
        model: any model that exports, ours or timm's.
        x: an example, (2, C, H, W); its size is kept, its batch is not.
        whole: leave attention and our operators as single nodes, to be run by PyTorch, instead of spelling them out;
            the scan, which has no product to quantize, always is one.

    Raises:
        RuntimeError: torch.export cannot trace the model; the message is its own.
    """
    training = model.training
    try:
        kept = keep_operators() if whole else keep_operators(SCAN)
        with torch.no_grad(), _quiet(), kept, contextlib.nullcontext() if whole else PlainAttention():
            program = torch.export.export(
                model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
            exported = program.module(check_guards=False)
    finally:
        model.train(training)
    module = fx.GraphModule(exported, exported.graph)  # the exporter's own refuses eval() and train()
    for name, parameter in [*module.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        setattr(
            module.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False)
        )
    _clean(module)
    _fold_batch_norm(module)
    module.recompile()
    return module


def _clean(module: fx.GraphModule) -> None:
    """Drop what does nothing in evaluation."""
    for node in [*module.graph.nodes]:
        if node.target in (aten.dropout.default, aten.contiguous.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _tensor(module: fx.GraphModule, node: Any) -> Tensor | None:
    return None if node is None else get_tensor(module, str(node.target))


def get_tensor(module: fx.GraphModule, name: str) -> Tensor:
    """Return a parameter or buffer of the graph."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def set_tensor(module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Replace a parameter of the graph, or add one."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def tidy(module: fx.GraphModule) -> None:
    """Drop nodes, submodules, parameters and buffers that a rewritten graph reads no more, and compile it."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for prefix, owner in [*module.named_modules()]:
        if prefix in called:
            continue
        for store in ("_parameters", "_buffers"):
            for leaf in [*getattr(owner, store)]:
                if f"{prefix}.{leaf}".lstrip(".") not in read:
                    del getattr(owner, store)[leaf]
    module.recompile()


def _fold_batch_norm(module: fx.GraphModule) -> None:
    """Fold each BatchNorm into the convolution or linear layer that alone feeds it."""
    for node in [*module.graph.nodes]:
        if node.target is not aten.batch_norm.default:
            continue
        layer = node.args[0]
        if layer.target not in (aten.conv2d.default, aten.linear.default) or len(layer.users) > 1:
            continue
        if layer.target is aten.linear.default and len(node.meta["val"].shape) != 2:
            continue  # channels are not last in what BatchNorm sees
        gamma, beta, mean, variance = (_tensor(module, node.args[i]) for i in (1, 2, 3, 4))
        weight = _tensor(module, layer.args[1])
        if weight is None or mean is None or variance is None or len(layer.args[1].users) > 1:
            continue
        bias = _tensor(module, layer.args[2] if len(layer.args) > 2 else None)
        scale = torch.rsqrt(variance + node.args[7]) * (1 if gamma is None else gamma)
        shift = ((0 if bias is None else bias) - mean) * scale + (0 if beta is None else beta)
        name = str(layer.args[1].target)
        set_tensor(module, name, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
        bias_name = name.removesuffix("weight") + "folded_bias"
        set_tensor(module, bias_name, shift)
        with module.graph.inserting_before(layer):
            bias_node = module.graph.get_attr(bias_name)
        arguments = list(layer.args)
        arguments[2:3] = [bias_node]
        layer.args = tuple(arguments)
        node.replace_all_uses_with(layer)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def source(node: Any) -> Any:
    """Return the node that computed an activation, behind operations that only move elements."""
    while node.op == "call_function" and node.target in _MOVES:
        node = node.args[0]
    return node


def concatenated(node: Any) -> bool:
    """Return whether an activation is several others side by side, as class token and patches are."""
    return source(node).target is aten.cat.default


def origin(node: Any) -> str:
    """Return what an activation comes from: "norm", "softmax", "gelu" or ""."""
    return _ORIGINS.get(source(node).target, "")


def _module_path(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


def _macs(node: Any, contracted: int) -> int:
    """Return the products an image of a node whose outputs each sum `contracted` of them."""
    shape = node.meta["val"].shape
    sizes = [int(n) for n in shape[1:] if isinstance(n, int)]
    per_batch = [n for n in shape[:1] if not isinstance(n, int)]
    folded = 1
    for size in per_batch:  # windows are folded into the batch: 4 s of them an image
        hint = int(size.node.hint) if hasattr(size, "node") else int(size)
        folded = max(1, hint // 2)
    return folded * math.prod(sizes) * contracted


def find_sites(module: fx.GraphModule) -> list[Site]:
    """Return the sites of a captured graph in the order they run."""
    sites: list[Site] = []
    taken: dict[str, int] = {}
    for node in module.graph.nodes:
        site = _site(module, node)
        if site is None:
            continue
        count = taken[site.name] = taken.get(site.name, 0) + 1
        name = site.name if count == 1 else f"{site.name}#{count}"
        sites.append(dataclasses.replace(site, name=name))
    return sites


def convolution_arguments(node: Any) -> tuple[Any, ...]:
    """Return input, weight, bias, stride, padding, dilation and groups of a convolution, defaults filled in."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    return (*node.args, *defaults[len(node.args) :])


def _pointwise(node: Any, weight: Tensor) -> bool:
    _, _, _, stride, padding, _, groups = convolution_arguments(node)
    return tuple(weight.shape[2:]) == (1, 1) and groups == 1 and {*stride} == {1} and {*padding} == {0}


def _result(node: Any) -> str:
    users = [*node.users]
    return str(users[0].name if len(users) == 1 and _rectifies(users[0]) else node.name)


def _rectifies(node: Any) -> bool:
    """Return whether a node cuts what lies below zero, and perhaps above a bound, and nothing else."""
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return len(node.args) > 1 and node.args[1] == 0
    return is_relu(node)


def is_relu(node: Any) -> bool:
    """Return whether a node is a ReLU."""
    return node.target in (aten.relu.default, aten.relu_.default)


def _site(module: fx.GraphModule, node: Any) -> Site | None:
    if node.target in (aten.linear.default, aten.conv2d.default):
        x, weight_node = node.args[:2]
        weight = _tensor(module, weight_node) if weight_node.op == "get_attr" else None
        if weight is None:
            return None
        kind = "linear" if node.target is aten.linear.default else "conv"
        name = str(weight_node.target)
        macs = _macs(node, math.prod(weight.shape[1:]))
        return Site(
            name.removesuffix(".weight"),
            kind,
            node.name,
            (x.name,),
            (origin(x),),
            name,
            macs,
            _result(node),
            kind == "conv" and _pointwise(node, weight),
        )
    if node.target in (aten.matmul.default, aten.bmm.default):
        a, b = node.args
        if "get_attr" in (a.op, b.op):
            return None
        origins = origin(a), origin(b)
        name = f"{_module_path(node)}.{'mix' if 'softmax' in origins else 'scores'}"
        macs = _macs(node, int(a.meta["val"].shape[-1]))
        return Site(name, "product", node.name, (a.name, b.name), origins, None, macs, node.name)
    return None


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm all of whose readers are linear sites: a change of its scale can move into their weights.

    Attributes:
        norm: name of the node.
        weight: name of its weight.
        bias: name of its bias.
        readers: names of the sites.
    """

    norm: str
    weight: str
    bias: str
    readers: tuple[str, ...]


def norm_groups(module: fx.GraphModule, sites: Iterable[Site]) -> list[NormGroup]:
    """Return the LayerNorms whose output only linear sites read, directly or through moves that keep channels last."""
    by_node = {site.node: site for site in sites}
    groups = []
    for node in module.graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args) < 4 or None in node.args[2:4]:
            continue
        readers = _linear_readers(node, by_node)
        if readers:
            groups.append(
                NormGroup(node.name, str(node.args[2].target), str(node.args[3].target), tuple(readers))
            )
    return groups


def _linear_readers(node: Any, sites: dict[str, Site]) -> list[str]:
    """Return the sites that read a node, none if anything else does."""
    found: list[str] = []
    channels = node.meta["val"].shape[-1]
    for user in node.users:
        site = sites.get(user.name)
        if site is not None and site.kind == "linear":
            found.append(site.name)
            continue
        keeps = user.target in (
            aten.reshape.default,
            aten.view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
        )
        inner = _linear_readers(user, sites) if keeps and user.meta["val"].shape[-1] == channels else []
        if not inner:
            return []
        found += inner
    return found


class Recorder(fx.Interpreter):
    """Runs a graph and shows the values of chosen nodes to a callback.

    Args:
        module: the graph.
        watch: names of the nodes.
        callback: called with a node's name and its value, once a run.
    """

    def __init__(
        self, module: fx.GraphModule, watch: Iterable[str], callback: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__(module)
        self.watch, self.callback = frozenset(watch), callback

    def run_node(self, n: fx.Node) -> object:
        """Run a node and show its value if it is watched."""
        value = super().run_node(n)
        if n.name in self.watch:
            self.callback(n.name, value)
        return value
