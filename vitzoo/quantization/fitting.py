"""Fits the quantizers of a captured model's sites, and their widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from vitzoo.quantization import calibration, search
from vitzoo.quantization.allocation import allocate
from vitzoo.quantization.captured import Captured, Samples
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import Recorder, Site, concatenated, get_tensor, source
from vitzoo.quantization.quantizers import Log2, Quantizer, TwinGelu, TwinSoftmax, Uniform
from vitzoo.quantization.relevance import contribution_scores
from vitzoo.quantization.simulate import SitePlan

SEARCH_IMAGES = 4
SEARCH_ROWS = 1024
RELEVANCE_IMAGES = 8


def fit_plans(captured: Captured, fixed: Mapping[str, Uniform]) -> dict[str, SitePlan]:
    """Return the plan of every site that the recipe quantizes.

    Args:
        captured: the model, after its scales were moved.
        fixed: norm node -> the quantizer of its output, where moving scales gave it, see `migration.move_scales`.
    """
    dynamic = {
        site.name
        for site in captured.sites
        if captured.recipe.activations == "dynamic" and site.kind != "conv"
    }
    watched = {name for site in captured.sites if site.name not in dynamic for name in site.operands}
    written = {site.name: site.result for site in captured.sites if _writes_codes(captured, site)}
    seen = captured.record(watched | {*written.values()})
    found = _searched(captured) if captured.recipe.fit == "search" and not dynamic else {}
    fitted: dict[tuple[str, str, int, bool], Quantizer] = {}

    def fit(node: str, which: str, bits: int, centred: bool = False) -> Quantizer:
        key = node, which, bits, centred
        if key not in fitted:
            of_norm = fixed.get(source(captured.nodes[node]).name)
            fitted[key] = of_norm or _activation(captured.recipe, seen[node], which, bits, centred)
        return fitted[key]

    plans = {}
    for site in captured.sites:
        if site.name in found:
            plans[site.name] = found[site.name]
            continue
        bits = captured.bits[site.name]
        bits = captured.recipe.activation_bits if bits == captured.recipe.weight_bits else bits
        pairs = zip(site.operands, site.origins, strict=True)
        of_operands: tuple[Quantizer, ...] = tuple(
            dynamic_placeholder(bits)
            if site.name in dynamic
            else fit(node, which, bits, _is_centred(captured, site, node))
            for node, which in pairs
        )
        weight = fit_weight(captured, site, captured.bits[site.name]) if site.weight else None
        output = fit(written[site.name], "", bits) if site.name in written else None
        plans[site.name] = SitePlan(of_operands, weight, site.name in dynamic, output)
    return plans


def widths_by_relevance(captured: Captured) -> dict[str, int]:
    """Return a width for each inner site by relevance, under the recipe's budget (LRP-QViT)."""
    recipe = captured.recipe
    assert recipe.average_bits is not None
    inner = [
        site for site in captured.sites if site.weight and captured.bits[site.name] == recipe.weight_bits
    ]
    with torch.inference_mode(False):
        model = copy.deepcopy(captured.model).double().eval()
        images = torch.cat(captured.batches)[:RELEVANCE_IMAGES].clone().double()
        scores = contribution_scores(model, images.split(1), [site.name for site in inner])
    seen = captured.record({site.operands[0] for site in inner})
    errors: dict[str, dict[int, float]] = {}
    for site in inner:
        weight, found = captured.weight(site), seen[site.operands[0]]
        errors[site.name] = {
            bits: scores[site.name]
            * (
                relative_error(weight, fit_weight(captured, site, bits))
                + relative_error(found.values, _activation(recipe, found, site.origins[0], bits))
            )
            for bits in recipe.mixed_bits
        }
    sizes = {
        site.name: site.macs if recipe.mixed_cost == "bitops" else captured.weight(site).numel()
        for site in inner
    }
    return allocate(errors, sizes, recipe.mixed_bits, recipe.average_bits)


def _writes_codes(captured: Captured, site: Site) -> bool:
    """Return whether a site's output is quantized too."""
    return site.kind == "conv" and captured.recipe.runs_as_integers and captured.recipe.conv_codes


def _is_centred(captured: Captured, site: Site, operand: str) -> bool:
    """Return whether an operand's range lies about zero where it has negative values, as OpenVINO needs it.

    It has no products of two operands with zero points, and moves a quantizer behind a concatenation to each of
    its inputs, after which its product with a weight fails where there is one.
    """
    if site.kind == "product":
        return True
    return (
        captured.recipe.runs_as_integers and site.kind == "linear" and concatenated(captured.nodes[operand])
    )


def _activation(recipe: Recipe, seen: Samples, which: str, bits: int, centred: bool = False) -> Quantizer:
    """Return the quantizer of an activation that comes from `which`, see `graph.origin`."""
    values = seen.values
    if which == "softmax" and recipe.softmax == "log2":
        return Log2(bits)
    if which == "softmax" and recipe.softmax == "log_sqrt2":
        return calibration.fit_log_sqrt2(values, bits)
    if which == "softmax" and recipe.softmax == "twin":
        return calibration.least_error(values, [TwinSoftmax(split, bits) for split in search.SPLITS])
    if which == "gelu" and recipe.gelu == "twin":
        step = values.max() / (2 ** (bits - 1) - 0.5)
        return calibration.least_error(values, [TwinGelu(step * (1 - 0.01 * i), bits) for i in range(90)])
    if which == "norm" and recipe.norm == "power_of_two":
        return calibration.fit_power_of_two_factors(values, bits)
    if recipe.fit == "percentile" and not recipe.runs_as_integers:
        return calibration.fit_percentile(values, bits)
    return calibration.fit_range(
        values,
        bits,
        recipe.fit != "minmax",
        extremes=(seen.low, seen.high),
        centred=centred,
        symmetric=recipe.symmetric,
    )


def fit_weight(captured: Captured, site: Site, bits: int) -> Uniform:
    """Return the quantizer of a site's weight as the recipe asks for it."""
    weight = captured.weight(site)
    if captured.recipe.reduce_range and bits == 8:
        bits = 7
    if captured.recipe.fit == "percentile" and not captured.recipe.runs_as_integers:
        return calibration.fit_percentile(weight, bits, 0)
    return symmetric_weight(captured, site, bits)


def symmetric_weight(captured: Captured, site: Site, bits: int) -> Uniform:
    """Return the quantizer of a site's weight with one symmetric scale an output channel."""
    weight = captured.weight(site)
    bound = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    return calibration.symmetric(bound, bits)


def _searched(captured: Captured) -> dict[str, SitePlan]:
    """Return plans from PTQ4ViT's search on whole images, against the gradient of the loss."""
    images = torch.cat(captured.batches)[:SEARCH_IMAGES].clone()
    gradients = _gradients(captured, images)
    seen: dict[str, Tensor] = {}
    operands = {name for site in captured.sites for name in site.operands}
    Recorder(captured.module, operands, seen.__setitem__).run(images)
    plans = {}
    for site in captured.sites:
        bits, gradient = captured.bits[site.name], gradients[site.name]
        inputs = [seen[name] for name in site.operands]
        if site.kind == "linear":
            weight = captured.weight(site)
            bias = captured.nodes[site.node].args[2] if len(captured.nodes[site.node].args) > 2 else None
            of_input, of_weight = search.search_linear(
                inputs[0].flatten(0, -2)[:SEARCH_ROWS],
                weight,
                None if bias is None else get_tensor(captured.module, str(bias.target)),
                bits,
                groups=3 if site.name.endswith("qkv") else 1,
                gradient=gradient.flatten(0, -2)[:SEARCH_ROWS],
                after_gelu=captured.recipe.gelu == "twin" and site.origins[0] == "gelu",
            )
            plans[site.name] = SitePlan((of_input,), of_weight)
        elif site.kind == "product" and "softmax" in site.origins and captured.recipe.softmax == "twin":
            of_probs, of_v = search.search_softmax_product(inputs[0], inputs[1], bits, gradient=gradient)
            plans[site.name] = SitePlan((of_probs, of_v))
        elif site.kind == "product":
            plans[site.name] = SitePlan(search.search_product(inputs[0], inputs[1], bits, gradient=gradient))
    return plans


@torch.inference_mode(False)
def _gradients(captured: Captured, images: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the cross-entropy with the predicted class at every site's output."""
    outputs: dict[str, Tensor] = {}
    recorder = Recorder(captured.module, [site.node for site in captured.sites], outputs.__setitem__)
    with torch.enable_grad():
        logits = recorder.run(images.clone().requires_grad_())
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
    found = torch.autograd.grad(loss, [outputs[site.node] for site in captured.sites])
    return {site.name: gradient for site, gradient in zip(captured.sites, found, strict=True)}


def dynamic_placeholder(bits: int) -> Uniform:
    """Return a quantizer that names a width; the scale of a dynamic site is found at each call."""
    return Uniform(torch.ones(()), torch.zeros(()), 0, 2**bits - 1)


def relative_error(x: Tensor, quantizer: Quantizer) -> float:
    """Return the squared error of a quantizer relative to the square of what it quantizes."""
    return float((x - quantizer(x)).square().sum() / x.square().sum())
