"""The quantized graph as runtimes take it: integer weights, and operators that stand for ONNX's Q and DQ nodes.

Each operator runs in PyTorch too, with the numbers of `simulate.py`, so that the graph that is exported is a graph that
was tested. `vitzoo.export.quantized` translates them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from vitzoo.kernels.bidirectional_selective_scan import bidirectional_selective_scan
from vitzoo.quantization.graph import (
    REARRANGES,
    SCAN,
    Site,
    concatenated,
    convolution_arguments,
    get_tensor,
    tidy,
)
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.quantizers import Quantizer, Uniform
from vitzoo.quantization.simulate import SitePlan, dynamic_range

aten = torch.ops.aten


@torch.library.custom_op("vitzoo_qdq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: float, zero_point: int, signed: bool) -> Tensor:
    """Return x as uint8 codes hold it: QuantizeLinear and DequantizeLinear with one scale a tensor.

    `signed` has them written as int8, each less by 128, and so is the zero point.
    """
    return Uniform(torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255)(x)


@fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, signed: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vitzoo_qdq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int, zero_point: int) -> Tensor:
    """Return (codes - zero_point) scale, one scale an index of `axis`: DequantizeLinear of a constant."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    return (codes.to(scale.dtype) - zero_point) * scale.reshape(shape)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, zero_point: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("vitzoo_qdq::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None) -> Tensor:
    """Return x W + bias, x quantized with a scale of its own, W (in, out) in integers with one scale a column."""
    weight = (codes.to(scale.dtype) - zero_point) * scale
    out = dynamic_range(x)(x) @ weight
    return out if bias is None else out + bias


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[1])


@torch.library.custom_op("vitzoo_qdq::dynamic_pointwise", mutates_args=())
def dynamic_pointwise(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None
) -> Tensor:
    """Return the 1 x 1 convolution of x (B, C, H, W) as a product of its channels, otherwise as `dynamic_linear`."""
    weight = (codes.to(scale.dtype) - zero_point) * scale
    out = dynamic_range(x)(x).permute(0, 2, 3, 1) @ weight
    return (out if bias is None else out + bias).permute(0, 3, 1, 2).contiguous()


@dynamic_pointwise.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1], *x.shape[2:])


@torch.library.custom_op("vitzoo_qdq::dynamic_product", mutates_args=())
def dynamic_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, each quantized with a scale of its own."""
    return dynamic_range(a)(a) @ dynamic_range(b)(b)


@dynamic_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def integer_graph(
    quantized: QuantizedModel, unsigned_weights: bool = False, signed_activations: bool = False
) -> fx.GraphModule:
    """Return a quantized model as the graph to export: it gives the logits that `quantized` gives.

    Args:
        quantized: from `quantize`, by a recipe whose `runs_as_integers` is true.
        unsigned_weights: hold weights with codes outside [-64, 63] as uint8 with zero point 128 instead of int8: the
            same values, and u8 x u8 products, which no CPU saturates.
        signed_activations: hold codes of static activations as int8, each less by 128: the same values. Dynamic ones
            stay uint8, the only kind of ONNX's DynamicQuantizeLinear.

    Raises:
        ValueError: the recipe has widths or quantizers that no runtime executes.
    """
    quantized.recipe.require_integers()
    return _Builder(quantized, unsigned_weights, signed_activations).run()


class _Builder:
    """Rewrites the planned sites of a copy of the float graph."""

    def __init__(self, quantized: QuantizedModel, unsigned_weights: bool, signed_activations: bool) -> None:
        self.quantized = quantized
        self.unsigned, self.signed = unsigned_weights, signed_activations
        self.module = copy.deepcopy(quantized.float_graph)
        self.graph = self.module.graph
        self.shared: dict[tuple[str, float, int, bool], fx.Node] = {}
        self.products: set[fx.Node] = set()

    def run(self) -> fx.GraphModule:
        nodes = {node.name: node for node in self.graph.nodes}
        self.products = {nodes[site.node] for site in self.quantized.sites if site.kind == "product"}
        for site in self.quantized.sites:
            plan = self.quantized.plans.get(site.name)
            if plan is not None:
                with self.graph.inserting_before(nodes[site.node]):
                    self._rewrite(site, plan, nodes[site.node], nodes[site.result])
        for node in self.graph.nodes:
            if node.target is getattr(torch.ops.vitzoo, SCAN).default:
                node.target = (
                    bidirectional_selective_scan  # exporters see through the function, not the operator
                )
        tidy(self.module)
        return self.module

    def _rewrite(self, site: Site, plan: SitePlan, node: fx.Node, result: fx.Node) -> None:
        build = {"linear": self._linear, "conv": self._conv, "product": self._product}[site.kind]
        replacement = build(site, plan, node)
        target = node
        if plan.output is not None:  # its codes begin at zero where a ReLU is part of it
            replacement, target = self._quantized(replacement, plan.output), result
        target.replace_all_uses_with(replacement)
        if node in self.products:
            self.products.add(replacement)
        for old in dict.fromkeys((target, node)):
            self.graph.erase_node(old)

    def _quantized(self, x: fx.Node, quantizer: Quantizer | None, signed: bool = False) -> fx.Node:
        assert isinstance(quantizer, Uniform)
        assert (quantizer.qmin, quantizer.qmax) == (0, 255)
        signed = signed or self.signed
        scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
        if not 0 <= zero_point <= 255:
            raise ValueError(f"zero point {zero_point} of {x.name} does not fit into uint8")
        key = x.name, scale, zero_point, signed
        if key not in self.shared:
            place = x.next if x.op != "placeholder" else self._first()
            with self.graph.inserting_before(place):
                self.shared[key] = self._call(
                    torch.ops.vitzoo_qdq.fake_quantize.default, x, scale, zero_point, signed
                )
        return self.shared[key]

    def _rearranged(self, x: fx.Node, quantizer: Quantizer | None, weight: Uniform | None) -> fx.Node:
        """Return x quantized, before its elements are rearranged if a product of activations gives or takes them.

        That is where OpenVINO looks for the quantizers of attention, and where they become part of its kernels.
        `weight` is the quantizer of the other factor, None of an activation.
        """
        moves = []
        source = x
        while source.op == "call_function" and source.target in REARRANGES:
            moves.append(source)
            source = source.args[0]  # type: ignore[assignment]
        centred = (  # only of signed codes is the zero point zero, where OpenVINO bears no other
            (weight is None or concatenated(x))
            and not (self.unsigned and (weight is None or weight.qmax > 63))
            and isinstance(quantizer, Uniform)
            and int(quantizer.zero_point) == 128
        )
        if weight is not None and source not in self.products:
            return self._quantized(x, quantizer, signed=centred)
        found = self._quantized(source, quantizer, signed=centred)
        for move in reversed(moves):
            with self.graph.inserting_before(move):
                found = self._call(move.target, found, *move.args[1:])
                found.kwargs = move.kwargs
        return found

    def _first(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr"))

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return self.graph.call_function(target, arguments)

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        flat = name.replace(".", "_")
        self.module.register_buffer(flat, value.contiguous())
        return self.graph.get_attr(flat)

    def _weight(self, site: Site, plan: SitePlan, transpose: bool) -> tuple[fx.Node, fx.Node, int]:
        """Return the nodes of a weight's codes and scales, and the zero point."""
        assert plan.weight is not None
        weight = get_tensor(self.quantized.float_graph, str(site.weight)).detach()
        zero_point = 128 if self.unsigned and plan.weight.qmax > 63 else 0
        codes = plan.weight_codes(weight) + zero_point
        codes = codes.to(torch.uint8 if zero_point else torch.int8)
        codes_node = self._constant(f"{site.weight}_codes", codes.flatten(1).t() if transpose else codes)
        scale_node = self._constant(f"{site.weight}_scale", plan.weight.scale.flatten())
        return codes_node, scale_node, zero_point

    def _corrected(self, site: Site, plan: SitePlan, bias: Any) -> Any:
        """Return the node of the bias with the plan's correction."""
        if plan.bias is None:
            return bias
        value = plan.bias
        if isinstance(bias, fx.Node):
            value = value + get_tensor(self.quantized.float_graph, str(bias.target)).detach()
        return self._constant(f"{site.node}_corrected_bias", value)

    def _linear(self, site: Site, plan: SitePlan, node: fx.Node) -> fx.Node:
        x, _, *rest = node.args
        assert isinstance(x, fx.Node)
        bias = self._corrected(site, plan, rest[0] if rest else None)
        codes, scale, zero_point = self._weight(site, plan, transpose=True)
        if plan.dynamic:
            operator = torch.ops.vitzoo_qdq.dynamic_linear.default
            return self._call(operator, x, codes, scale, zero_point, bias)
        weight = self._call(torch.ops.vitzoo_qdq.dequantize.default, codes, scale, 1, zero_point)
        quantizer = plan.operands[0]
        quantized = self._rearranged(x, quantizer, plan.weight)
        if isinstance(bias, fx.Node) and node.meta["val"].ndim == 2:
            # ONNX Runtime makes a float Gemm of such a sum before it looks for integers; this one it runs in them
            assert isinstance(quantizer, Uniform)
            assert plan.weight is not None
            steps = quantizer.scale * plan.weight.scale.flatten()
            return self._call(aten.addmm.default, self._bias(site, bias, steps), quantized, weight)
        product = self._call(aten.matmul.default, quantized, weight)
        return product if bias is None else self._call(aten.add.Tensor, product, bias)

    def _conv(self, site: Site, plan: SitePlan, node: fx.Node) -> fx.Node:
        x, _, bias, stride, padding, dilation, groups = convolution_arguments(node)
        bias = self._corrected(site, plan, bias)
        if plan.dynamic:
            codes, scale, zero_point = self._weight(site, plan, transpose=True)
            operator = torch.ops.vitzoo_qdq.dynamic_pointwise.default
            return self._call(operator, x, codes, scale, zero_point, bias)
        codes, scale, zero_point = self._weight(site, plan, transpose=False)
        quantizer = plan.operands[0]
        assert isinstance(quantizer, Uniform)
        assert plan.weight is not None
        weight = self._call(torch.ops.vitzoo_qdq.dequantize.default, codes, scale, 0, zero_point)
        if isinstance(bias, fx.Node):
            bias = self._bias(site, bias, quantizer.scale * plan.weight.scale.flatten())
        quantized = self._rearranged(x, quantizer, plan.weight)
        return self._call(aten.conv2d.default, quantized, weight, bias, stride, padding, dilation, groups)

    def _bias(self, site: Site, node: fx.Node, scale: Tensor) -> fx.Node:
        """Return the bias in int32 steps of the accumulator, what an integer convolution adds, or in floating point."""
        if self.quantized.recipe.symmetric:
            return node
        values = get_tensor(self.module, str(node.target)).detach()
        limit = 2**31 - 1
        codes = torch.round(values.double() / scale.double()).clamp(-limit, limit).to(torch.int32)
        name = f"{site.weight}_bias"
        arguments = self._constant(f"{name}_codes", codes), self._constant(f"{name}_scale", scale)
        return self._call(torch.ops.vitzoo_qdq.dequantize.default, *arguments, 0, 0)

    def _product(self, site: Site, plan: SitePlan, node: fx.Node) -> fx.Node:
        a, b = node.args
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        if plan.dynamic:
            return self._call(torch.ops.vitzoo_qdq.dynamic_product.default, a, b)
        operands = zip((a, b), plan.operands, strict=True)
        return self._call(aten.matmul.default, *(self._rearranged(x, q, None) for x, q in operands))
