"""Runs a captured graph with some of its products quantized, exactly as integers would give them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitzoo.quantization.graph import Site, get_tensor, set_tensor
from vitzoo.quantization.quantizers import Quantizer, Uniform


@dataclass(frozen=True)
class SitePlan:
    """How one site is quantized.

    Attributes:
        operands: the quantizer of each activation operand; None leaves it as it is.
        weight: the quantizer of the weight, None for a product of activations.
        dynamic: fit the activation's scale anew for each call, to its extremes; `operands` then gives the width.
        output: the quantizer of a convolution's output, which integer convolutions write as codes; a ReLU that alone
            reads it is part of it, since its codes begin at zero.
        rounded: the weight on the grid of its quantizer where it is not rounded to the nearest code.
        bias: added to the output, one value a channel: what quantization takes from its mean.
    """

    operands: tuple[Quantizer | None, ...]
    weight: Uniform | None = None
    dynamic: bool = False
    output: Quantizer | None = None
    rounded: Tensor | None = None
    bias: Tensor | None = None

    def weight_codes(self, weight: Tensor) -> Tensor:
        """Return the codes of the site's weight, whole numbers in its dtype."""
        assert self.weight is not None
        return self.weight.codes(weight if self.rounded is None else self.rounded)

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Return the site's weight as its codes hold it."""
        assert self.weight is not None
        return self.weight.dequantize(self.weight_codes(weight))


def along_channels(values: Tensor, site: Site) -> Tensor:
    """Return one value a channel in a shape that broadcasts against a site's output."""
    return values[:, None, None] if site.kind == "conv" else values


def dynamic_range(x: Tensor, qmin: int = 0, qmax: int = 255) -> Uniform:
    """Return the affine quantizer that ONNX's DynamicQuantizeLinear uses: extremes of the tensor, zero included."""
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = ((high - low) / (qmax - qmin)).clamp_min(torch.finfo(torch.float32).tiny)
    return Uniform(scale, torch.round(qmin - low / scale).clamp(qmin, qmax), qmin, qmax)


def quantize_operand(plan: SitePlan, index: int, x: Tensor) -> Tensor:
    """Return operand `index` of a site as its codes hold it."""
    quantizer = plan.operands[index]
    if quantizer is None:
        return x
    if plan.dynamic:
        assert isinstance(quantizer, Uniform)
        return dynamic_range(x, quantizer.qmin, quantizer.qmax)(x)
    return quantizer(x)


class Simulator(fx.Interpreter):
    """Interprets a captured graph; the sites that have a plan compute with quantized operands.

    Args:
        module: the graph.
        sites: its sites.
        plans: site name -> plan; sites without one stay in floating point.
        compare: called with a site's name, its output and its output by quantized operands; the latter is then dropped,
            so that each site sees exact inputs.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        sites: Iterable[Site],
        plans: Mapping[str, SitePlan],
        compare: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__(module)
        self.compare = compare
        self.plans = {site.node: (site, plans[site.name]) for site in sites if site.name in plans}
        self.nodes = {node.name: node for node in module.graph.nodes}
        self.weights: dict[tuple[str, int], Tensor] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node; `run_node` has set which one it is."""
        found = self.plans.get(self.current)
        if found is None:
            return super().call_function(target, args, kwargs)
        site, plan = found
        quantized = self.quantized(site, plan, target, args, kwargs)
        if self.compare is None:
            return quantized
        exact = super().call_function(target, args, kwargs)
        if plan.output is None or site.result == site.node:
            self.compare(site.name, exact, quantized)
            return exact
        # a ReLU whose result the codes hold belongs to what they are compared with
        node = self.nodes[site.result]
        rectified = super().call_function(node.target, (exact.clone(), *node.args[1:]), {})
        self.compare(site.name, rectified, quantized)
        return exact

    def quantized(
        self, site: Site, plan: SitePlan, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return a site's output by quantized operands."""
        out = self.product(site, plan, target, args, kwargs)
        return out if plan.output is None else plan.output(out)

    def product(
        self, site: Site, plan: SitePlan, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return a site's output by quantized operands before it is itself quantized."""
        changed = list(args)
        for i in range(len(site.operands)):
            changed[i] = quantize_operand(plan, i, changed[i])
        if site.weight is not None and plan.weight is not None:
            key = site.name, id(plan)
            if key not in self.weights:
                self.weights[key] = plan.quantized_weight(changed[1])
            changed[1] = self.weights[key]
        out = super().call_function(target, tuple(changed), kwargs)
        return out if plan.bias is None else out + along_channels(plan.bias, site)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node of the graph."""
        self.current = n.name
        return super().run_node(n)


class FakeQuantize(nn.Module):
    """A quantizer as a module: its tensors are buffers.

    Args:
        quantizer: what it applies.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self._quantizer = quantizer
        self._tensors = []
        for field in dataclasses.fields(quantizer):  # type: ignore[arg-type]
            value = getattr(quantizer, field.name)
            if isinstance(value, Tensor):
                self.register_buffer(field.name, value.detach().clone())
                self._tensors.append(field.name)

    def forward(self, x: Tensor) -> Tensor:
        """Return x as its codes hold it."""
        tensors = {name: getattr(self, name) for name in self._tensors}
        return dataclasses.replace(self._quantizer, **tensors)(x)  # type: ignore[type-var]


class DynamicQuantize(nn.Module):
    """Quantizes a tensor with a scale of its own at each call.

    Args:
        qmin: lowest code.
        qmax: highest code.
    """

    def __init__(self, qmin: int, qmax: int) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax

    def forward(self, x: Tensor) -> Tensor:
        """Return x as its codes hold it."""
        return dynamic_range(x, self.qmin, self.qmax)(x)


def simulated(module: fx.GraphModule, sites: Iterable[Site], plans: Mapping[str, SitePlan]) -> fx.GraphModule:
    """Return a copy of a captured graph whose planned sites compute with quantized operands.

    Args:
        module: the graph; it is not changed.
        sites: its sites.
        plans: site name -> plan; sites without one stay in floating point.
    """
    module = copy.deepcopy(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for site in sites:
        if site.name in plans:
            _quantize_site(module, nodes[site.node], site, plans[site.name])
    module.graph.lint()
    module.recompile()
    return module


def _quantize_site(module: fx.GraphModule, node: fx.Node, site: Site, plan: SitePlan) -> None:
    arguments = list(node.args)
    for i, quantizer in enumerate(plan.operands[: len(site.operands)]):
        if quantizer is None:
            continue
        name = f"quantize_{node.name}_{i}"
        if plan.dynamic:
            assert isinstance(quantizer, Uniform)
            module.add_module(name, DynamicQuantize(quantizer.qmin, quantizer.qmax))
        else:
            module.add_module(name, FakeQuantize(quantizer))
        with module.graph.inserting_before(node):
            arguments[i] = module.graph.call_module(name, (arguments[i],))
    node.args = tuple(arguments)
    if plan.output is not None:
        name = f"quantize_{node.name}_out"
        module.add_module(name, FakeQuantize(plan.output))
        with module.graph.inserting_after(node):
            quantized = module.graph.call_module(name, (node,))
        node.replace_all_uses_with(quantized, lambda user: user is not quantized)
    if site.weight is not None and plan.weight is not None:
        set_tensor(module, site.weight, plan.quantized_weight(get_tensor(module, site.weight).detach()))
        if plan.bias is not None:
            add_to_bias(module, node, site, plan.bias)


def add_to_bias(module: fx.GraphModule, node: fx.Node, site: Site, value: Tensor) -> None:
    """Add to the bias of a linear layer or convolution of a graph; one without a bias gets it."""
    arguments = list(node.args)
    bias = arguments[2] if len(arguments) > 2 else None
    if isinstance(bias, fx.Node):
        value = get_tensor(module, str(bias.target)).detach() + value
    name = f"{str(site.weight).removesuffix('weight')}{node.name}_bias"
    set_tensor(module, name, value)
    with module.graph.inserting_before(node):
        arguments[2:3] = [module.graph.get_attr(name)]
    node.args = tuple(arguments)
