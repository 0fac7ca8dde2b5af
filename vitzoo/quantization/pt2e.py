"""A quantized model as PyTorch's own passes expect one: the graph with quantize and dequantize operators of PT2E.

`torch.ops.quantized_decomposed` marks what is quantized and says with which scales; the graph itself computes in float,
as a simulation. `vitzoo.deploy.lower_int8` compiles it to integer kernels.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines torch.ops.quantized_decomposed

from vitzoo.quantization.convert import WholeGraph
from vitzoo.quantization.graph import Site, get_tensor, tidy
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.modules import unsigned
from vitzoo.quantization.quantizers import Quantizer, Uniform
from vitzoo.quantization.simulate import SitePlan

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_UINT8 = (0, 255, torch.uint8)


def pt2e_graph(model: nn.Module, quantized: QuantizedModel) -> fx.GraphModule:
    """Return a quantized model as a graph of PT2E's operators, with a dynamic batch.

    Linear layers and convolutions have the codes and scales of `quantized`. Attention's products and our operators are
    single nodes in floating point.

    Args:
        model: the float model that was quantized, on the CPU; it is not changed.
        quantized: made from it by `quantize`.

    Returns:
        The graph, which gives the simulation's logits but for values that fall on a tie between two codes.

    Raises:
        ValueError: the recipe has widths or quantizers that can only be simulated, a zero point outside uint8, or
            `model` is not what was quantized.
        RuntimeError: torch.export cannot trace the model; the message is its own.
    """
    quantized.recipe.require_integers()
    return _Rewriting(model, quantized).run()


class _Rewriting(WholeGraph):
    """One call of `pt2e_graph`."""

    def __init__(self, model: nn.Module, quantized: QuantizedModel) -> None:
        super().__init__(model, quantized)
        # codes of a node by scale and zero point, which several layers may read
        self.codes: dict[tuple[str, Any], fx.Node] = {}

    @torch.no_grad()
    def run(self) -> fx.GraphModule:
        for site in self.quantized.sites:
            plan = self.quantized.plans.get(site.name)
            if plan is not None and site.weight:
                self._rewrite(self.sites[site.name], plan)
        tidy(self.module)
        return self.module

    def _rewrite(self, site: Site, plan: SitePlan) -> None:
        node = self.nodes[site.node]
        x: Any = node.args[0]
        bias = self.bias(node, plan)
        weight = get_tensor(self.module, str(site.weight)).detach()
        codes = plan.weight_codes(weight).to(torch.int8)
        as_linear = (
            plan.dynamic and site.kind == "conv"
        )  # a pointwise one: Inductor has no dynamic convolution
        with self.graph.inserting_before(node):
            if as_linear:
                moved = self._call(aten.permute.default, x, [0, 2, 3, 1])
                x, codes = (
                    self._call(aten.clone.default, moved, memory_format=torch.contiguous_format),
                    codes.flatten(1),
                )
        operand = self._dynamic(x) if plan.dynamic else self._static(x, plan.operands[0])
        with self.graph.inserting_before(node):
            arguments: list[Any] = [*node.args]
            arguments[:2] = [operand, self._weight(site, plan, codes)]
            if bias is not None:
                arguments[2:3] = [self._constant(f"{site.name}.corrected_bias", bias)]
            if as_linear:
                out = self._call(aten.linear.default, *arguments[:3])
                node.replace_all_uses_with(self._call(aten.permute.default, out, [0, 3, 1, 2]))
            else:
                node.args = tuple(arguments)
        if plan.output is not None:
            self._quantize_output(self.nodes[site.result], plan.output)

    def _quantize_output(self, node: fx.Node, quantizer: Quantizer) -> None:
        # a dequantization for each reader: those that stay in float do not keep the others from being fused
        for user in [*node.users]:
            user.replace_input_with(node, self._static(node, quantizer))

    def _static(self, x: fx.Node, quantizer: Quantizer | None) -> fx.Node:
        """Return the node of x as its codes hold it."""
        assert isinstance(quantizer, Uniform)
        assert (quantizer.qmin, quantizer.qmax) == (0, 255)
        parameters = float(quantizer.scale), int(unsigned(quantizer.zero_point))
        if x.target is decomposed.dequantize_per_tensor.default and x.args[1:3] == parameters:
            codes: Any = x.args[0]  # they are codes of these already
        else:
            codes = self.codes.get((x.name, parameters))
        if codes is None:
            with self.graph.inserting_after(x):
                codes = self._call(decomposed.quantize_per_tensor.default, x, *parameters, *_UINT8)
            self.codes[x.name, parameters] = codes
        with self.graph.inserting_after(codes):
            return self._call(decomposed.dequantize_per_tensor.default, codes, *parameters, *_UINT8)

    def _dynamic(self, x: fx.Node) -> fx.Node:
        """Return the node of x as codes of its own extremes hold it, zero included."""
        codes = self.codes.get((x.name, None))
        if codes is None:
            place, tiny = x, torch.finfo(torch.float32).tiny
            made: list[fx.Node] = []
            for target, arguments in (
                (decomposed.choose_qparams.tensor, lambda: (x, *_UINT8[:2], tiny, torch.uint8)),
                (operator.getitem, lambda: (made[0], 0)),
                (operator.getitem, lambda: (made[0], 1)),
                (decomposed.quantize_per_tensor.tensor, lambda: (x, *made[1:3], *_UINT8)),
            ):
                with self.graph.inserting_after(place):
                    place = self._call(target, *arguments())
                made.append(place)
            codes = self.codes[x.name, None] = place
        with self.graph.inserting_after(codes):
            return self._call(decomposed.dequantize_per_tensor.tensor, codes, *codes.args[1:3], *_UINT8)

    def _weight(self, site: Site, plan: SitePlan, codes: Tensor) -> fx.Node:
        assert plan.weight is not None
        scale = plan.weight.scale.flatten()
        return self._call(
            decomposed.dequantize_per_channel.default,
            self._constant(f"{site.name}.codes", codes),
            self._constant(f"{site.name}.scale", scale),
            self._constant(f"{site.name}.zero_point", torch.zeros(len(scale), dtype=torch.int64)),
            *(0, -128, 127, torch.int8),
        )

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        flat = name.replace(".", "_").replace("#", "_")
        self.module.register_buffer(flat, value.contiguous())
        return self.graph.get_attr(flat)

    def _call(self, target: Any, *arguments: Any, **named: Any) -> fx.Node:
        return self.graph.call_function(target, arguments, named)
