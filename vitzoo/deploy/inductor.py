"""A quantized model compiled by Inductor to the integer kernels of oneDNN, through the passes of torchao."""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from vitzoo.benchmark.machine import this_machine
from vitzoo.deploy.coverage import Coverage
from vitzoo.deploy.formats import has_whole_range
from vitzoo.export.common import require
from vitzoo.quantization.model import QuantizedModel
from vitzoo.quantization.pt2e import pt2e_graph

_NAMESPACES = ("aten", "mkl", "mkldnn", "onednn", "torchvision")
_INTEGER = ("onednn.qlinear_pointwise", "onednn.qconv_pointwise", "onednn.qconv2d_pointwise")


class InductorModel(nn.Module):
    """A quantized model that Inductor compiled; the call takes images and returns logits.

    Attributes:
        coverage: its products of one image, by the operators of Inductor's graph once weights are packed for oneDNN.
        integer_products: products of that graph in integers, by number.
        input_size: channels, height and width of the images.
        num_classes, pretrained_cfg: of the float model, where it has them: timm finds its data configuration there.
    """

    def __init__(self, graph: fx.GraphModule, x: Tensor, like: nn.Module) -> None:
        super().__init__()
        for name in ("num_classes", "pretrained_cfg"):
            if hasattr(like, name):
                setattr(self, name, copy.deepcopy(getattr(like, name)))
        self.input_size = tuple(x.shape[1:])
        self._run, self.coverage, self.integer_products = compiled(graph, x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self._run(x)
        return logits


def lower_int8(model: nn.Module, quantized: QuantizedModel, batch_size: int = 8) -> InductorModel:
    """Compile a quantized model: linear layers and convolutions run in integers, by oneDNN, on x86 CPUs.

    The graph is `vitzoo.quantization.pt2e.pt2e_graph`. It is compiled here for one batch size and the present number
    of threads (`torch.set_num_threads`), with the weights as constants; a call with another batch compiles once more,
    which takes a minute or more. Attention's products stay in float. Inductor needs a C++ compiler.

    Importing torchao adds its passes to Inductor for the whole process; they touch graphs with PT2E's operators only.

    Args:
        model: the float model that was quantized, on the CPU; it is not changed.
        quantized: made from it by `vitzoo.quantize`.
        batch_size: images that it is compiled for.

    Returns:
        The compiled model.

    Raises:
        ImportError: torchao is missing; the message has the line that installs it.
        ValueError: the recipe is simulated only, `model` is not what was quantized, or this machine has no x86 CPU, or
            one that would saturate sums of full-range products.
        RuntimeError: Inductor left a quantized layer in floating point, or cannot compile the model.
    """
    register_passes()
    here = this_machine()
    if not here.startswith("x86"):
        raise ValueError(
            f"this machine is {here}: the integer kernels behind lower_int8 are x86's; take convert_int8"
        )
    if here == "x86-avx2" and has_whole_range(quantized):
        raise ValueError(
            "this CPU has no VNNI and would saturate sums of full-range u8 x s8 products: quantize with "
            "reduce_range = true, or take convert_int8, which never saturates"
        )
    graph = pt2e_graph(model, quantized)
    planned = [site.name for site in quantized.sites if site.weight and site.name in quantized.plans]
    made = InductorModel(graph, torch.zeros(batch_size, *quantized.input_size), model).eval()
    if made.integer_products < len(planned):
        raise RuntimeError(
            f"Inductor runs {made.integer_products} of {len(planned)} quantized layers in integers; in float: "
            f"{', '.join(made.coverage.floating)}"
        )
    return made


def register_passes() -> None:
    """Add torchao's passes, which match PT2E's operators, to Inductor.

    Raises:
        ImportError: torchao is missing; the message has the line that installs it.
    """
    require(["torchao"], "Inductor's INT8 road")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's own code
        importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


def compiled(module: nn.Module, x: Tensor) -> tuple[Any, Coverage, int]:
    """Compile a module for the shape of x with its weights as constants.

    Args:
        module: a float one, or after `register_passes` a graph of PT2E's operators.
        x: images, (B, C, H, W); the module is run on them.

    Returns:
        what runs it, without gradients; its products of one image; the number of integer ones.

    Raises:
        RuntimeError: Inductor cannot compile the module.
    """
    products = _Products()
    with warnings.catch_warnings(), inductor_config.patch(post_grad_custom_pre_pass=products):
        warnings.simplefilter("ignore")  # of torch's own code
        program = torch.compile(module, dynamic=False)

        def run(x: Tensor) -> Any:
            # dynamo asks too whether weights are constants: an option of torch.compile comes too late
            with torch.no_grad(), inductor_config.patch(freezing=True):
                return program(x)

        run(x)
    if not products.by_kernel:
        raise RuntimeError("Inductor gave no graph to count: it was called with another's cached code")
    return run, products.coverage(len(x)), products.integer


class _Products(CustomGraphPass):
    """Reads off Inductor's graph which multiply-accumulates run where.

    It is the graph after constants are folded and weights packed. What follows changes no product: operators behind
    them are fused into them, and their nodes become functions without a name.
    """

    def __init__(self) -> None:
        self.by_kernel: dict[str, int] = {}
        self.integer = 0
        self.seen = False

    def __call__(self, graph: fx.Graph) -> None:
        if self.seen:
            return
        self.seen = True
        for node in graph.nodes:
            macs = _macs(node) if node.op == "call_function" else 0
            if macs:
                kernel = str(node.target)
                self.by_kernel[kernel] = self.by_kernel.get(kernel, 0) + macs
                self.integer += kernel.startswith(_INTEGER)

    def uuid(self) -> None:
        """Return None: code from a cache would pass this by."""
        return None

    def coverage(self, images: int) -> Coverage:
        """Return the products of one image."""
        by_kernel = {kernel: macs // images for kernel, macs in self.by_kernel.items()}
        floating = {kernel: n for kernel, n in by_kernel.items() if not kernel.startswith(_INTEGER)}
        ordered = dict(sorted(floating.items(), key=lambda item: -item[1]))
        total = sum(by_kernel.values())
        return Coverage(total - sum(ordered.values()), total, by_kernel, ordered)


def _macs(node: Any) -> int:
    """Return the multiply-accumulates of a node of Inductor's graph."""
    namespace, _, name = str(node.target).partition(".")
    if namespace not in _NAMESPACES or "prepack" in name or "reorder" in name:
        return 0
    name, _, overload = name.partition(".")
    if name.startswith("_scaled_dot_product"):
        q, k, v = (_shape(argument) for argument in node.args[:3])
        return math.prod(q[:3]) * k[2] * (q[3] + v[3])
    if "conv" in name:
        weight = node.args[3 if namespace == "onednn" else 2 if overload == "binary" else 1]
        out = _shape(node)
        return math.prod(out) * math.prod(_shape(weight)) // out[1]
    if "linear" in name:
        return math.prod(_shape(node)) * _shape(node.args[0])[-1]
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        return math.prod(_shape(node)) * _shape(node.args["add" in name])[-1]
    return 0


def _shape(node: Any) -> list[int]:
    """Return the shape of a product's result or factor; other nodes, of torchao's passes, need not know theirs."""
    return [int(n) for n in node.meta["val"].shape]
