"""A quantized model whose linear layers run in integers in PyTorch, without a compiler and without another runtime.

The model is captured once more with attention and our operators whole, so that what stays in floating point runs on the
kernels it always runs on. Weights, scales and codes are those of the quantized model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitzoo.kernels.int8_linear.reference import row_scale, to_codes
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import Site, capture, find_sites, get_tensor, set_tensor, tidy
from vitzoo.quantization.model import LayerReport, QuantizedModel
from vitzoo.quantization.modules import Int8Linear, unsigned
from vitzoo.quantization.quantizers import Uniform
from vitzoo.quantization.simulate import DynamicQuantize, SitePlan, simulated
from vitzoo.stack import with_room

aten = torch.ops.aten
# float32 rounding of two graphs of the same function, spelled differently
SAME_FUNCTION = 1e-3

_ACTIVATIONS = {aten.gelu.default: "gelu", aten.relu.default: "relu", aten.relu_.default: "relu"}
_WHY_FLOAT = {
    "conv": "a convolution: the kernels take linear layers",
    "product": "a product of two activations: the kernels take linear layers",
    "linear": "the recipe left it in float",
}


class Int8Model(nn.Module):
    """A model whose linear layers are `Int8Linear`; the call takes images and returns logits.

    The state dict holds the integer weights and every scale, and loads into any conversion of the same model by a
    recipe that makes the same choices.

    Attributes:
        recipe: what it was quantized by.
        body: the model as a graph module; integer layers have the names of those that they replace, with `_int8` added
            where one is called twice or its float tensors are read elsewhere.
        input_size: channels, height and width of the images.
        layers: what was done to each product; mode "static", "dynamic" (a scale a token) or "float".
        floating: name of each product in floating point -> why.
        num_classes, pretrained_cfg: of the float model, where it has them: timm finds its data configuration there.
    """

    def __init__(
        self,
        recipe: Recipe,
        body: fx.GraphModule,
        input_size: tuple[int, int, int],
        layers: Sequence[LayerReport],
        floating: Mapping[str, str],
        paths: Mapping[str, str],
        like: nn.Module,
    ) -> None:
        super().__init__()
        # what timm reads preprocessing, labels and input size from
        for name in ("num_classes", "pretrained_cfg"):
            if hasattr(like, name):
                setattr(self, name, copy.deepcopy(getattr(like, name)))
        self.recipe, self.input_size = recipe, input_size
        self.layers, self.floating = tuple(layers), dict(floating)
        self.body = body
        self._paths = dict(paths)

    @with_room  # the body is one function with a frame of several kilobytes, and calls hundreds
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return self.body(x)

    @property
    def int8_layers(self) -> dict[str, Int8Linear]:
        """Return the integer layers by the names of the products in `layers`."""
        found = {name: self.body.get_submodule(path) for name, path in self._paths.items()}
        return {name: layer for name, layer in found.items() if isinstance(layer, Int8Linear)}


def convert_int8(model: nn.Module, quantized: QuantizedModel) -> Int8Model:
    """Return a quantized model as a module whose linear layers run in 8-bit integers on the CPU or the GPU.

    Static layers compute with the codes and scales of `quantized`. Dynamic ones take a scale for each token, max|x| /
    127, where ONNX's are a batch's: an image's logits do not depend on its neighbours. GELU and ReLU between two
    integer layers become part of the first, which then writes the codes that the second reads. Convolutions and
    attention's products are in floating point, and so are layers that the recipe left there.

    A static layer with the inputs of the simulation gives its outputs to float32 rounding. In a network such rounding
    moves single values across a tie between two codes, so that logits agree to a fraction of the quantization error.
    On the CPU the integer layers give the same bits for every instruction set and number of threads.

    Args:
        model: the float model that was quantized, on the CPU; it is not changed.
        quantized: made from it by `quantize`.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: the recipe has widths or quantizers that can only be simulated, a zero point outside uint8, or
            `model` is not what was quantized.
        RuntimeError: torch.export cannot trace the model; the message is its own.
    """
    quantized.recipe.require_integers()
    return _Conversion(model, quantized).run()


def simulate_int8(quantized: QuantizedModel) -> fx.GraphModule:
    """Return the simulation of what `convert_int8` gives: linear layers alone quantized, dynamic ones by token."""
    linear = {site.name for site in quantized.sites if site.kind == "linear"}
    graph = simulated(
        quantized.float_graph,
        quantized.sites,
        {name: plan for name, plan in quantized.plans.items() if name in linear},
    )
    for name, module in [*graph.named_modules()]:
        if isinstance(module, DynamicQuantize):
            graph.set_submodule(name, _TokenQuantize())
    return graph


class _TokenQuantize(nn.Module):
    """Quantizes each row with a scale of its own, as `int8_linear` does where it chooses."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x as its codes hold it."""
        scale = row_scale(x)
        return to_codes(x, scale, None, torch.int8) * scale


class WholeGraph:
    """The float model of a quantized one, captured with attention and our operators whole, to be rewritten.

    Args:
        model: the float model that was quantized, on the CPU; it is not changed.
        quantized: made from it by `quantize`.

    Attributes:
        module: the graph, with the weights and biases of `quantized.float_graph`, where transforms changed some.
        graph: its graph.
        nodes: its nodes by name.
        sites: its layers with a weight by name.

    Raises:
        ValueError: `model` is not what was quantized.
        RuntimeError: torch.export cannot trace the model; the message is its own.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, quantized: QuantizedModel) -> None:
        self.model, self.quantized = model, quantized
        self.module = capture(model, torch.zeros(2, *quantized.input_size), whole=True)
        self.graph = self.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.sites = {site.name: site for site in find_sites(self.module) if site.weight}
        self._take_tensors()
        self._check()

    def _take_tensors(self) -> None:
        """Take every weight from the quantized model's graph, where transforms have changed some."""
        source = self.quantized.float_graph
        expected = {site.name for site in self.quantized.sites if site.weight}
        if expected != {*self.sites}:
            odd = sorted(expected ^ {*self.sites})
            raise ValueError(
                f"the model is not the one that was quantized: only one of them has {', '.join(odd[:3])}"
            )
        there = {node.name: node for node in source.graph.nodes}
        for site in self.quantized.sites:
            if site.weight:
                self._take_bias(self.sites[site.name], there[site.node])
        here = dict(self.module.named_parameters())
        for name, value in source.named_parameters():
            if name in here:
                if here[name].shape != value.shape:
                    raise ValueError(
                        f"the model is not the one that was quantized: {name} has shape {tuple(here[name].shape)}, "
                        f"there it has {tuple(value.shape)}"
                    )
                set_tensor(self.module, name, value.detach().clone())

    def _take_bias(self, site: Site, there: Any) -> None:
        """Read the bias that the quantized model's layer reads; transforms add one where there was none."""
        bias = there.args[2] if len(there.args) > 2 else None
        node = self.nodes[site.node]
        if bias is None:
            return
        name = str(bias.target)
        set_tensor(self.module, name, get_tensor(self.quantized.float_graph, name).detach().clone())
        with self.graph.inserting_before(node):
            read = self.graph.get_attr(name)
        arguments: list[Any] = [*node.args]
        arguments[2:3] = [read]
        node.args = tuple(arguments)

    def _check(self) -> None:
        """Refuse another model: both graphs, before anything is in integers, are the same function."""
        self.module.recompile()
        x = torch.randn(2, *self.quantized.input_size, generator=torch.Generator().manual_seed(0))
        here, there = self.module(x), self.quantized.float_graph(x)
        difference = float((here - there).norm() / there.norm())
        if not difference <= SAME_FUNCTION:
            raise ValueError(
                f"the model is not the one that was quantized: in float their logits differ by {difference:.1e}"
            )

    def bias(self, node: fx.Node, plan: SitePlan) -> Tensor | None:
        """Return the bias of a layer with the plan's correction."""
        bias: Any = node.args[2] if len(node.args) > 2 else None
        if bias is None:
            return plan.bias
        value = get_tensor(self.module, str(bias.target))
        return value if plan.bias is None else value + plan.bias


class _Conversion(WholeGraph):
    """One call of `convert_int8`."""

    def __init__(self, model: nn.Module, quantized: QuantizedModel) -> None:
        super().__init__(model, quantized)
        self.built: dict[fx.Node, Int8Linear] = {}
        self.paths: dict[str, str] = {}

    @torch.no_grad()
    def run(self) -> Int8Model:
        quantized, recipe = self.quantized, self.quantized.recipe
        for site in quantized.sites:
            if site.name in quantized.plans and site.kind == "linear":
                self._replace(site, quantized.plans[site.name])
        for node, layer in self.built.items():
            self._absorb(node, layer)
        self._finish()
        layers = [
            layer if layer.name in self.paths else dataclasses.replace(layer, bits=None, mode="float")
            for layer in quantized.layers
        ]
        floating = {
            site.name: _WHY_FLOAT[site.kind] for site in quantized.sites if site.name not in self.paths
        }
        size = quantized.input_size
        return Int8Model(recipe, self.module, size, layers, floating, self.paths, self.model).eval()

    def _replace(self, site: Site, plan: SitePlan) -> None:
        node = self.nodes[self.sites[site.name].node]
        quantizer, weight_quantizer = plan.operands[0], plan.weight
        assert isinstance(quantizer, Uniform)
        assert weight_quantizer is not None
        weight = get_tensor(self.module, str(site.weight)).detach()
        layer = Int8Linear(
            plan.weight_codes(weight).to(torch.int8),
            weight_quantizer.scale.flatten(),
            self.bias(node, plan),
            None if plan.dynamic else quantizer.scale.reshape(()),
            None if plan.dynamic else unsigned(quantizer.zero_point),
        )
        name = self._name(site, node)
        if name != site.name:  # its own holds the float tensors until all nodes are rewritten
            self.module.add_submodule(name, layer)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        self.built[call], self.paths[site.name] = layer, name

    def _name(self, site: Site, node: fx.Node) -> str:
        """Return the layer's own name, or another if something else still reads what is stored under it."""
        name = site.name
        inside = f"{name}."
        others = [
            user
            for read in self.graph.nodes
            if read.op in ("get_attr", "call_module") and f"{read.target}.".startswith(inside)
            for user in (read.users if read.op == "get_attr" else [read])
            if user is not node
        ]
        free = not others and "#" not in name and str(site.weight) != name
        return name if free else f"{name.replace('#', '_')}_int8"

    def _absorb(self, node: fx.Node, layer: Int8Linear) -> None:
        """Make the activation that alone reads a layer part of it, and the codes of the integer layer after that."""
        user = _only_user(node)
        kind = None if user is None else _ACTIVATIONS.get(user.target)
        exact = user is not None and user.kwargs.get("approximate", "none") == "none"
        if user is not None and kind is not None and exact:
            layer.activation = kind
            user.replace_all_uses_with(node)
            self.graph.erase_node(user)
            user = _only_user(node)
        reader = None if user is None else self.built.get(user)
        if reader is not None and reader.x_scale is not None and reader.x_zero_point is not None:
            layer.out_scale, layer.out_zero_point = reader.x_scale.clone(), reader.x_zero_point.clone()

    def _finish(self) -> None:
        for node in [*self.graph.nodes]:
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        for node, layer in self.built.items():
            self.module.add_submodule(str(node.target), layer)
        tidy(self.module)


def _only_user(node: fx.Node) -> Any:
    users = [*node.users]
    return users[0] if len(users) == 1 else None
