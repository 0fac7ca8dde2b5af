"""Weights rounded so that the layer's output, not the weight, is nearest; and the mean that quantization takes from it.

Both leave an ordinary graph: other codes of the same quantizers, another bias.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from vitzoo.quantization.captured import Captured
from vitzoo.quantization.graph import Site, convolution_arguments, get_tensor
from vitzoo.quantization.quantizers import Uniform
from vitzoo.quantization.simulate import Simulator, SitePlan, quantize_operand

DAMPING = 0.01
BLOCK = 128
# images whose inputs the products are summed over, and rows taken of each image at most
IMAGES = 16
ROWS = 1024
MEAN_IMAGES = 32


def round_least_squares(weight: Tensor, quantizer: Uniform, products: Tensor) -> Tensor:
    """Round a weight so that the output on inputs like those seen is nearest to the exact one.

    Columns are rounded one after another, those of the largest inputs first; what a column's rounding does to the
    output is made good in the columns that follow, by least squares.

    Args:
        weight: (G, O, K), G groups of O rows.
        quantizer: of each row: its tensors broadcast against (G, O, 1).
        products: sums of x x^T over inputs x, (G, K, K).

    Returns:
        Values on the quantizer's grid, in the shape of `weight`. Where the result would be worse than rounding to
        nearest on these inputs, as clipped codes can make it, a row is rounded to nearest.

    Source: GPTQ (arXiv 2210.17323), section 3, equations 2 and 3, by Cholesky; order of its "act-order".
    """
    hessian = products.double()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    hessian = hessian + torch.diag_embed(damping.expand_as(diagonal))
    order = diagonal.argsort(dim=-1, descending=True, stable=True)  # (G, K)
    permuted = hessian.gather(1, order[:, :, None].expand_as(hessian))
    permuted = permuted.gather(2, order[:, None, :].expand_as(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    columns = order[:, None, :].expand_as(weight)
    rounded = torch.stack(
        [
            torch.from_numpy(_by_columns(rows.T.numpy(), factor[g].numpy(), _of_group(quantizer, g))).T
            for g, rows in enumerate(weight.detach().gather(2, columns))
        ]
    )
    found = torch.empty_like(rounded).scatter_(2, columns, rounded)
    nearest = quantizer(weight)

    def error(values: Tensor) -> Tensor:
        change = (values - weight).double()
        return ((change @ products.double()) * change).sum(-1, keepdim=True)

    return torch.where(error(found) <= error(nearest), found, nearest)


def _of_group(quantizer: Uniform, group: int) -> Uniform:
    return dataclasses.replace(
        quantizer,
        scale=quantizer.scale[group].flatten(),
        zero_point=quantizer.zero_point.expand_as(quantizer.scale)[group].flatten(),
    )


def _by_columns(weight: Any, factor: Any, quantizer: Uniform) -> Any:
    """Round a transposed weight (K, O) row by row, the error of each made good in those below it.

    In NumPy, whose small operations are several times as fast as PyTorch's.
    """
    rest, rounded = weight.copy(), np.empty_like(weight)
    scale, zero = quantizer.scale.numpy(), quantizer.zero_point.numpy()

    def nearest(x: Any) -> Any:
        codes = np.rint(x / scale + zero) if quantizer.shift_first else np.rint(x / scale) + zero
        return (codes.clip(quantizer.qmin, quantizer.qmax) - zero) * scale

    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        block, errors = rest[start:stop], np.empty_like(rest[start:stop])
        for i in range(stop - start):
            k = start + i
            rounded[k] = nearest(block[i])
            errors[i] = (block[i] - rounded[k]) / factor[k, k]
            block[i:] -= factor[k, k:stop, None] * errors[i]
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return rounded


def round_weight(weight: Tensor, quantizer: Uniform, products: Tensor) -> Tensor:
    """Return `round_least_squares` of a layer's weight in the weight's own shape.

    Args:
        weight: of a linear layer (out, in) or convolution (out, in / G, kh, kw).
        quantizer: one scale an output channel.
        products: (G, K, K), see `input_products`.
    """
    rows = weight.flatten(1).unflatten(0, (len(products), -1))  # (G, O, K)
    scale, zero = (x.flatten().reshape(*rows.shape[:2], 1) for x in (quantizer.scale, quantizer.zero_point))
    of_rows = Uniform(scale, zero, quantizer.qmin, quantizer.qmax, quantizer.shift_first)
    return round_least_squares(rows, of_rows, products).reshape(weight.shape)


class _Products(Simulator):
    """Runs a graph exactly and sums x x^T over the quantized inputs x of each planned layer."""

    def __init__(self, module: fx.GraphModule, sites: Iterable[Site], plans: Mapping[str, SitePlan]) -> None:
        super().__init__(module, sites, plans)
        self.sums: dict[str, Tensor] = {}

    def quantized(
        self, site: Site, plan: SitePlan, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Add to a site's sums; return its exact output."""
        x = quantize_operand(plan, 0, args[0])
        if site.kind == "conv":
            stride, padding, dilation, groups = convolution_arguments(self.node)[3:]
            kernel = args[1].shape[2:]
            unfolded = F.unfold(x, kernel, dilation, padding, stride)  # (B, C kh kw, places)
            rows = unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)  # (G, B, places, K)
        else:
            rows = x.reshape(1, x.shape[0], -1, x.shape[-1])
        step = max(1, -(-rows.shape[2] // ROWS))
        rows = rows[:, :, ::step].flatten(1, 2)
        found = rows.mT @ rows
        self.sums[site.name] = self.sums[site.name] + found if site.name in self.sums else found
        return fx.Interpreter.call_function(self, target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node of the graph."""
        self.node = n
        return super().run_node(n)


def _rounds(module: fx.GraphModule, site: Site) -> bool:
    """Return whether a site's weight has columns enough for one to make good another's rounding."""
    return site.weight is not None and get_tensor(module, site.weight).shape[1] > 1


def input_products(
    module: fx.GraphModule, sites: Sequence[Site], plans: Mapping[str, SitePlan], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the sums (G, K, K) of x x^T over quantized inputs of each planned site with a weight.

    Depthwise convolutions are left out: their rows are too short for the method.

    Args:
        module: the captured graph.
        sites: its sites.
        plans: how their operands are quantized.
        batches: images, each (B, C, H, W); the first `IMAGES` are taken.
    """
    runner = _Products(module, [site for site in sites if _rounds(module, site)], plans)
    for x in torch.cat([*batches])[:IMAGES].split(len(batches[0])):
        runner.run(x)
    return runner.sums


class _Means(Simulator):
    """Runs a graph exactly and sums, by channel, what each way of quantizing each site takes from its output."""

    def __init__(
        self, module: fx.GraphModule, sites: Iterable[Site], options: Mapping[str, Mapping[str, SitePlan]]
    ) -> None:
        super().__init__(module, sites, {name: next(iter(found.values())) for name, found in options.items()})
        self.options = options
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.counts: dict[str, int] = defaultdict(int)

    def quantized(
        self, site: Site, plan: SitePlan, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Add to a site's sums; return its exact output."""
        exact = fx.Interpreter.call_function(self, target, args, kwargs)
        channel = 1 if site.kind == "conv" else -1
        for name, option in self.options[site.name].items():
            lost = exact - self.product(site, option, target, args, kwargs)
            total = lost.movedim(channel, 0).flatten(1).double().sum(1)
            before = self.sums[site.name].get(name)
            self.sums[site.name][name] = total if before is None else before + total
        self.counts[site.name] += exact.numel() // exact.shape[channel]
        return exact


def mean_losses(
    module: fx.GraphModule,
    sites: Sequence[Site],
    options: Mapping[str, Mapping[str, SitePlan]],
    batches: Iterable[Tensor],
) -> dict[str, dict[str, Tensor]]:
    """Return the mean that quantizing a site takes from each channel of its output, its input exact.

    Args:
        module: the captured graph.
        sites: its sites.
        options: site name -> name of an option -> plan, of sites that have a weight.
        batches: images, each (B, C, H, W).

    Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
        1906.04721), section 4.2, with measured instead of assumed means.
    """
    runner = _Means(module, sites, {name: found for name, found in options.items() if found})
    for x in batches:
        runner.run(x)
    return {
        site: {name: (total / runner.counts[site]).float() for name, total in found.items()}
        for site, found in runner.sums.items()
    }


def improved(captured: Captured, options: dict[str, dict[str, SitePlan]]) -> dict[str, dict[str, SitePlan]]:
    """Round weights and correct biases as the recipe says: site -> name of an option -> plan, as it was given."""
    if captured.recipe.rounding == "least_squares":
        captured.tell("round weights by least squares")
        options = _rounded(captured, options)
    if captured.recipe.bias_correction:
        captured.tell("correct biases")
        weighted = {
            name: found for name, found in options.items() if captured.by_name[name].weight is not None
        }
        losses = mean_losses(captured.module, captured.sites, weighted, captured.first(MEAN_IMAGES))
        options = {
            name: {
                mode: dataclasses.replace(plan, bias=losses[name][mode]) if name in losses else plan
                for mode, plan in found.items()
            }
            for name, found in options.items()
        }
    return options


def _rounded(captured: Captured, options: dict[str, dict[str, SitePlan]]) -> dict[str, dict[str, SitePlan]]:
    first = {name: next(iter(found.values())) for name, found in options.items()}
    products = input_products(captured.module, captured.sites, first, captured.batches)
    rounded: dict[str, dict[str, SitePlan]] = {}
    for name, found in options.items():
        if name not in products:
            rounded[name] = found
            continue
        values: dict[int, Tensor] = {}  # by the width of the weight, which modes share
        for plan in found.values():
            assert plan.weight is not None
            if plan.weight.qmax not in values:
                weight = captured.weight(captured.by_name[name])
                values[plan.weight.qmax] = round_weight(weight, plan.weight, products[name])
        rounded[name] = {
            mode: dataclasses.replace(plan, rounded=values[plan.weight.qmax])  # type: ignore[union-attr]
            for mode, plan in found.items()
        }
    return rounded
