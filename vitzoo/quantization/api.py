"""Quantizes a trained model by a recipe: capture, calibrate, transform, choose, and hand back a model that runs."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from vitzoo.quantization import calibration, search
from vitzoo.quantization.allocation import allocate
from vitzoo.quantization.choice import FLOAT, Cost, choose, fastest_file, reason
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import (
    NormGroup,
    Recorder,
    Site,
    capture,
    concatenated,
    find_sites,
    get_tensor,
    norm_groups,
    set_tensor,
    source,
)
from vitzoo.quantization.migration import migrate
from vitzoo.quantization.model import LayerReport, QuantizedModel
from vitzoo.quantization.quantizers import Log2, Quantizer, TwinGelu, TwinSoftmax, Uniform
from vitzoo.quantization.relevance import contribution_scores
from vitzoo.quantization.rounding import input_products, mean_losses, round_weight
from vitzoo.quantization.simulate import Simulator, SitePlan, add_to_bias
from vitzoo.quantization.sweep import logit_errors
from vitzoo.quantization.transforms import reparameterized, smoothing_scales

# Values of one operand kept for fitting; more images than fill it are thinned evenly.
SAMPLE = 1 << 20
SEARCH_IMAGES = 4
SEARCH_ROWS = 1024
SENSITIVITY_IMAGES = 8
CHOICE_IMAGES = 4  # "auto" measures each layer several times; only the ratios of its errors matter
# what "auto" leaves to integers at least, where the error budget lets it: the default of the gate
LEAST_INTEGER_SHARE = 0.9

# (graph, sites, one batch, site -> modes) -> site -> mode, "float" too -> milliseconds
Clock = Callable[
    [fx.GraphModule, Sequence[Site], Tensor, Mapping[str, Sequence[str]]], Mapping[str, Mapping[str, float]]
]
# models -> speed of each one's whole file relative to the float file
Race = Callable[[Sequence[QuantizedModel]], Sequence[float]]
RELEVANCE_IMAGES = 8
MEAN_IMAGES = 32


@dataclass
class _Samples:
    """Values that a node took during calibration: thinned to `SAMPLE`; its extremes and its channels' magnitudes."""

    parts: list[Tensor] = field(default_factory=list)
    channel_max: Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    def add(self, x: Tensor, batches: int) -> None:
        largest = x.detach().abs().flatten(0, -2).amax(0)
        self.channel_max = largest if self.channel_max is None else torch.maximum(self.channel_max, largest)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        rows = x.detach().flatten(0, -2)
        step = max(1, -(-rows.numel() * batches // SAMPLE))
        self.parts.append(rows[::step].clone())

    @property
    def values(self) -> Tensor:
        return torch.cat(self.parts)


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration_batches: Iterable[Tensor],
    filter_fn: Callable[[Site], bool] | None = None,
    progress: Callable[[str], None] | None = None,
    measure_layers: bool = False,
    clock: Clock | None = None,
    race: Race | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe.

    Args:
        model: a trained model, float32, on the CPU; it is not changed.
        recipe: see `Recipe`.
        calibration_batches: images as the model takes them, (B, C, H, W), all of one size; 32 to 300 images in all.
        filter_fn: which sites may be quantized; default all.
        progress: called with a few words at the start of each step.
        measure_layers: measure the logit error of each layer alone, see `sensitivity`, also where no error budget asks.
        clock: measures what each layer takes in each mode, for a recipe whose activations are "auto";
            `vitzoo.quantize` gives one.
        race: measures whole files for the same recipes, so that none is chosen that is slower than float;
            `vitzoo.quantize` gives one. Without it the times of the layers decide.

    Returns:
        A new model; layers that the recipe's error budget forbids stay in floating point and say so.

    Raises:
        ValueError: no images, images of several sizes, a recipe that finds nothing to quantize, or "auto" without a
            clock.
    """
    call = _Quantization(model, recipe, list(calibration_batches), filter_fn, progress)
    return call.run(measure_layers, clock, race)


def sensitivity(
    model: nn.Module,
    recipe: Recipe,
    calibration_batches: Iterable[Tensor],
    images: int = SENSITIVITY_IMAGES,
    filter_fn: Callable[[Site], bool] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[LayerReport, ...]:
    """Measure what a recipe does to each layer by itself, all others in floating point.

    With y the exact output of a layer and y' its output by quantized operands, on the same exact input,

        sqnr_db = 10 log10(sum y^2 / sum (y' - y)^2),

    over the first batch. With z the exact logits and z' those when this layer alone is quantized,

        logit_error = norm(z' - z) / norm(z),

    over the first `images`. Noise of different layers is nearly independent: the root of the sum of squared logit
    errors is about the error of all layers together.

    Args:
        model: a trained model, float32, on the CPU; it is not changed.
        recipe: see `Recipe`; its error budget is not applied.
        calibration_batches: images as the model takes them, (B, C, H, W), all of one size.
        images: how many of them the logits are compared on.
        filter_fn: which sites may be quantized; default all.
        progress: called with a few words at the start of each step.

    Returns:
        One report a layer in the order they run; layers that the recipe leaves alone have neither figure.

    Raises:
        ValueError: no images, images of several sizes, or a recipe that finds nothing to quantize.
    """
    return _Quantization(model, recipe, list(calibration_batches), filter_fn, progress).sensitivity(images)


class _Quantization:
    """One call of `quantize`, step by step."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: list[Tensor],
        filter_fn: Callable[[Site], bool] | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        if not batches or not sum(len(x) for x in batches):
            raise ValueError("there are no calibration images; give at least one batch (B, C, H, W)")
        sizes = {tuple(x.shape[1:]) for x in batches}
        if len(sizes) > 1:
            raise ValueError(f"calibration images have several sizes: {', '.join(map(str, sorted(sizes)))}")
        self.model, self.recipe, self.batches = model, recipe, batches
        self.tell = progress or (lambda step: None)
        self.tell("capture the graph")
        self.module = capture(model, torch.zeros(2, *batches[0].shape[1:]))
        self.all_sites = find_sites(self.module)
        self.sites = [site for site in self.all_sites if self._wanted(site) and (filter_fn or _every)(site)]
        if not self.sites:
            raise ValueError(f"recipe {recipe.name!r} finds nothing to quantize in {type(model).__name__}")
        self.nodes = {node.name: node for node in self.module.graph.nodes}
        self.by_name = {site.name: site for site in self.all_sites}
        self.bits = {site.name: self._bits(site) for site in self.sites}
        self.alphas: dict[str, float] = {}
        with torch.inference_mode():
            self.logits = torch.cat([self.module(x) for x in batches])

    def _wanted(self, site: Site) -> bool:
        if any(fnmatch.fnmatch(site.name, pattern) for pattern in self.recipe.skip):
            return False
        return site.kind != "product" or self.recipe.products

    def _bits(self, site: Site) -> int:
        weighted = [s.name for s in self.all_sites if s.kind != "product"]
        ends = (weighted[0], weighted[-1]) if weighted else ()
        return self.recipe.first_last_bits if site.name in ends else self.recipe.weight_bits

    @torch.inference_mode()
    def run(self, measure_layers: bool, clock: Clock | None, race: Race | None) -> QuantizedModel:
        if self.recipe.activations == "auto":
            return self._automatic(clock, race)
        plans = self._planned()
        self.tell("measure each layer")
        layers, plans = self._choose(plans, measure_layers)
        error = self._error(plans)
        return QuantizedModel(self.recipe, self.module, self.all_sites, plans, layers, error)

    def _planned(self) -> dict[str, SitePlan]:
        """Transform the graph and return the plan of every site."""
        fixed = self._transform()
        if self.recipe.mixed_bits:
            self.tell("weigh layers by relevance")
            self._allocate()
        self.tell("fit quantizers")
        plans = self._fit(fixed)
        improved = self._improved({name: {"": plan} for name, plan in plans.items()})
        return {name: found[""] for name, found in improved.items()}

    def _automatic(self, clock: Clock | None, race: Race | None) -> QuantizedModel:
        """Choose each site's mode by its measured time and error."""
        recipe = self.recipe
        if clock is None:
            raise ValueError(
                f"recipe {recipe.name!r} chooses by the time of each layer: call vitzoo.quantize, which measures it in "
                "ONNX Runtime, or give a clock"
            )
        assert recipe.error_budget is not None
        fixed = self._transform()
        self.tell("fit quantizers")
        options = self._improved(
            {name: self._options(self.by_name[name], plan) for name, plan in self._fit(fixed).items()}
        )
        self.tell("time each layer in each mode")
        times = clock(self.module, self.sites, self.batches[0], {name: [*o] for name, o in options.items()})
        self.tell("measure each layer in each mode")
        first = torch.cat(self.batches)[:CHOICE_IMAGES].split(len(self.batches[0]))
        errors = logit_errors(self.module, self.sites, options, first)
        costs = {
            name: {
                mode: Cost(ms, errors[name][mode] if mode != FLOAT else 0.0)
                for mode, ms in times[name].items()
            }
            for name in options
        }
        self.tell("choose under the error budget")
        macs = {site.name: site.macs for site in self.all_sites}
        by_layer = choose(
            costs,
            recipe.error_budget,
            lambda choice: self._error(_plans_of(options, choice)),
            macs,
            round(LEAST_INTEGER_SHARE * sum(macs.values())),
        )
        chosen, why_float = by_layer, None
        if race is not None:
            self.tell("time whole files")
            chosen, why_float = self._raced(race, by_layer, costs, options)
        plans = _plans_of(options, chosen)
        noise, alone = self._noise(plans), _errors_of(errors, chosen)
        layers = []
        for site in self.all_sites:
            report = self._report(site, plans, noise, alone)
            if site.name in costs:
                why = reason(costs[site.name], by_layer[site.name])
                if chosen[site.name] != by_layer[site.name]:
                    why = why_float or f"the whole file, which is faster than with {by_layer[site.name]} here"
                report = dataclasses.replace(report, costs=costs[site.name], why=why)
            layers.append(report)
        return QuantizedModel(
            recipe, self.module, self.all_sites, plans, layers, self._error(plans), why_float
        )

    def _raced(
        self,
        race: Race,
        chosen: Mapping[str, str],
        costs: Mapping[str, Mapping[str, Cost]],
        options: Mapping[str, Mapping[str, SitePlan]],
    ) -> tuple[dict[str, str], str | None]:
        """Return the choice whose whole file is the fastest, and why it is floating point if it is."""
        budget = self.recipe.error_budget
        assert budget is not None

        def speeds_of(choices: Sequence[Mapping[str, str]]) -> Sequence[float]:
            plans = [_plans_of(options, choice) for choice in choices]
            return race([QuantizedModel(self.recipe, self.module, self.all_sites, p, (), 0.0) for p in plans])

        def holds(choice: Mapping[str, str]) -> bool:
            return self._error(_plans_of(options, choice)) <= budget

        found, speed = fastest_file(chosen, costs, holds, speeds_of)
        if set(found.values()) != {FLOAT}:
            return found, None
        tried = (
            f"the best file with layers in integers had {speed:.2f} times its speed"
            if speed
            else "each layer in integers is slower by itself or exceeds it"
        )
        return found, f"float is the fastest that holds the error budget of {budget:.1%}: {tried}"

    def _options(self, site: Site, static: SitePlan) -> dict[str, SitePlan]:
        """Return the modes of a site that runtimes run in integers."""
        found = {"static": static}
        if site.kind != "conv" or site.pointwise:
            operands = tuple(dynamic_placeholder(8) for _ in site.operands)
            found["dynamic"] = SitePlan(operands, static.weight, dynamic=True)
        if self.recipe.reduce_range and site.weight is not None:
            whole = self._symmetric_weight(site, 8)
            found |= {f"{mode} u8": dataclasses.replace(plan, weight=whole) for mode, plan in found.items()}
        return found

    def _improved(self, options: dict[str, dict[str, SitePlan]]) -> dict[str, dict[str, SitePlan]]:
        """Round weights and correct biases as the recipe says."""
        if self.recipe.rounding == "least_squares":
            self.tell("round weights by least squares")
            options = self._rounded(options)
        if self.recipe.bias_correction:
            self.tell("correct biases")
            weighted = {
                name: found for name, found in options.items() if self.by_name[name].weight is not None
            }
            first = torch.cat(self.batches)[:MEAN_IMAGES].split(len(self.batches[0]))
            losses = mean_losses(self.module, self.sites, weighted, first)
            options = {
                name: {
                    mode: dataclasses.replace(plan, bias=losses[name][mode]) if name in losses else plan
                    for mode, plan in found.items()
                }
                for name, found in options.items()
            }
        return options

    def _rounded(self, options: dict[str, dict[str, SitePlan]]) -> dict[str, dict[str, SitePlan]]:
        first = {name: next(iter(found.values())) for name, found in options.items()}
        products = input_products(self.module, self.sites, first, self.batches)
        rounded: dict[str, dict[str, SitePlan]] = {}
        for name, found in options.items():
            if name not in products:
                rounded[name] = found
                continue
            values: dict[int, Tensor] = {}  # by the width of the weight, which modes share
            for plan in found.values():
                assert plan.weight is not None
                if plan.weight.qmax not in values:
                    weight = get_tensor(self.module, str(self.by_name[name].weight))
                    values[plan.weight.qmax] = round_weight(weight, plan.weight, products[name])
            rounded[name] = {
                mode: dataclasses.replace(plan, rounded=values[plan.weight.qmax])  # type: ignore[union-attr]
                for mode, plan in found.items()
            }
        return rounded

    @torch.inference_mode()
    def sensitivity(self, images: int) -> tuple[LayerReport, ...]:
        plans = self._planned()
        self.tell("measure each layer")
        noise, errors = self._noise(plans), self._errors(plans, images)
        return tuple(self._report(site, plans, noise, errors) for site in self.all_sites)

    # transforms -------------------------------------------------------------------------------------------------

    def _record(self, nodes: Iterable[str], module: fx.GraphModule | None = None) -> dict[str, _Samples]:
        found: dict[str, _Samples] = defaultdict(_Samples)
        recorder = Recorder(
            module or self.module, nodes, lambda name, x: found[name].add(x, len(self.batches))
        )
        for x in self.batches:
            recorder.run(x)
        return found

    def _transform(self) -> dict[str, Uniform]:
        """Move scales out of the activations; return the quantizers this fixes, by norm node."""
        if self.recipe.smooth == "auto":
            self.tell("move scales out of the activations where it helps")
            bits = 7 if self.recipe.reduce_range else self.recipe.weight_bits
            self.alphas = migrate(self.module, self.sites, self.batches, bits)
        groups = norm_groups(self.module, self.sites)
        if not groups or (self.recipe.smooth is None and self.recipe.norm != "channel"):
            return {}
        self.tell("move scales out of the activations")
        if self.recipe.smooth is not None and self.recipe.smooth != "auto":
            seen = self._record([group.norm for group in groups])
            for group in groups:
                self._smooth(group, seen[group.norm])
        if self.recipe.norm != "channel":
            return {}
        seen = self._record([group.norm for group in groups])
        return {group.norm: self._reparameterize(group, seen[group.norm].values) for group in groups}

    def _readers(self, group: NormGroup) -> list[tuple[Site, Tensor]]:
        sites = [self.by_name[name] for name in group.readers]
        return [(site, get_tensor(self.module, str(site.weight))) for site in sites]

    def _smooth(self, group: NormGroup, seen: _Samples) -> None:
        assert seen.channel_max is not None
        assert isinstance(self.recipe.smooth, float | int)
        readers = self._readers(group)
        scales = smoothing_scales(seen.channel_max, [weight for _, weight in readers], self.recipe.smooth)
        for name in (group.weight, group.bias):
            set_tensor(self.module, name, get_tensor(self.module, name) / scales)
        for site, weight in readers:
            set_tensor(self.module, str(site.weight), weight * scales)
            self.alphas[site.name] = self.recipe.smooth

    def _reparameterize(self, group: NormGroup, values: Tensor) -> Uniform:
        channels = calibration.fit_percentile(values, self.recipe.activation_bits, 1)
        weight, bias = get_tensor(self.module, group.weight), get_tensor(self.module, group.bias)
        moved = reparameterized(weight, bias, channels, round_zero_point=True)
        set_tensor(self.module, group.weight, moved.norm_weight)
        set_tensor(self.module, group.bias, moved.norm_bias)
        for site, matrix in self._readers(group):
            set_tensor(self.module, str(site.weight), matrix * moved.ratio)
            add_to_bias(self.module, self.nodes[site.node], site, (matrix * moved.ratio) @ moved.shift)
        self.module.recompile()
        return moved.quantizer

    # quantizers -------------------------------------------------------------------------------------------------

    def _fit(self, fixed: Mapping[str, Uniform]) -> dict[str, SitePlan]:
        dynamic = {site.name for site in self.sites if self._is_dynamic(site)}
        watched = {name for site in self.sites if site.name not in dynamic for name in site.operands}
        written = {site.name: site.result for site in self.sites if self._writes_codes(site)}
        seen = self._record(watched | {*written.values()})
        found = self._searched() if self.recipe.fit == "search" and not dynamic else {}
        fitted: dict[tuple[str, str, int, bool], Quantizer] = {}

        def fit(node: str, which: str, bits: int, centred: bool = False) -> Quantizer:
            key = node, which, bits, centred
            if key not in fitted:
                fixed_one = fixed.get(self._norm_of(node))
                fitted[key] = fixed_one or self._activation(seen[node], which, bits, centred)
            return fitted[key]

        plans = {}
        for site in self.sites:
            if site.name in found:
                plans[site.name] = found[site.name]
                continue
            bits = self._activation_bits(site)
            pairs = zip(site.operands, site.origins, strict=True)
            of_operands: tuple[Quantizer, ...] = tuple(
                dynamic_placeholder(bits)
                if site.name in dynamic
                else fit(node, which, bits, self._is_centred(site, node))
                for node, which in pairs
            )
            weight = self._weight(site, self.bits[site.name]) if site.weight else None
            output = fit(written[site.name], "", bits) if site.name in written else None
            plans[site.name] = SitePlan(of_operands, weight, site.name in dynamic, output)
        return plans

    def _writes_codes(self, site: Site) -> bool:
        """Return whether a site's output is quantized too."""
        return site.kind == "conv" and self.recipe.runs_as_integers and self.recipe.conv_codes

    def _is_centred(self, site: Site, operand: str) -> bool:
        """Return whether an operand's range lies about zero, as OpenVINO needs it.

        It has no products of two operands with zero points, and moves a quantizer behind a concatenation to each of its
        inputs, after which its product with a weight fails where there is one.
        """
        if site.kind == "product":
            return True
        return self.recipe.runs_as_integers and site.kind == "linear" and concatenated(self.nodes[operand])

    def _is_dynamic(self, site: Site) -> bool:
        return self.recipe.activations == "dynamic" and site.kind != "conv"

    def _activation_bits(self, site: Site) -> int:
        bits = self.bits[site.name]
        return self.recipe.activation_bits if bits == self.recipe.weight_bits else bits

    def _norm_of(self, name: str) -> str:
        return str(source(self.nodes[name]).name)

    def _activation(self, seen: _Samples, which: str, bits: int, centred: bool = False) -> Quantizer:
        recipe, values = self.recipe, seen.values
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
            values, bits, recipe.fit != "minmax", extremes=(seen.low, seen.high), centred=centred
        )

    def _weight(self, site: Site, bits: int) -> Uniform:
        weight = get_tensor(self.module, str(site.weight))
        if self.recipe.reduce_range and bits == 8:
            bits = 7
        if self.recipe.fit == "percentile" and not self.recipe.runs_as_integers:
            return calibration.fit_percentile(weight, bits, 0)
        return self._symmetric_weight(site, bits)

    def _symmetric_weight(self, site: Site, bits: int) -> Uniform:
        weight = get_tensor(self.module, str(site.weight))
        bound = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1))
        return calibration.symmetric(bound, bits)

    def _searched(self) -> dict[str, SitePlan]:
        """Return plans from PTQ4ViT's search on whole images, against the gradient of the loss."""
        images = torch.cat(self.batches)[:SEARCH_IMAGES].clone()
        gradients = self._gradients(images)
        seen: dict[str, Tensor] = {}
        operands = {name for site in self.sites for name in site.operands}
        Recorder(self.module, operands, seen.__setitem__).run(images)
        plans = {}
        for site in self.sites:
            bits, gradient = self.bits[site.name], gradients[site.name]
            inputs = [seen[name] for name in site.operands]
            if site.kind == "linear":
                weight = get_tensor(self.module, str(site.weight))
                bias = self.nodes[site.node].args[2] if len(self.nodes[site.node].args) > 2 else None
                of_input, of_weight = search.search_linear(
                    inputs[0].flatten(0, -2)[:SEARCH_ROWS],
                    weight,
                    None if bias is None else get_tensor(self.module, str(bias.target)),
                    bits,
                    groups=3 if site.name.endswith("qkv") else 1,
                    gradient=gradient.flatten(0, -2)[:SEARCH_ROWS],
                    after_gelu=self.recipe.gelu == "twin" and site.origins[0] == "gelu",
                )
                plans[site.name] = SitePlan((of_input,), of_weight)
            elif site.kind == "product" and "softmax" in site.origins and self.recipe.softmax == "twin":
                of_probs, of_v = search.search_softmax_product(inputs[0], inputs[1], bits, gradient=gradient)
                plans[site.name] = SitePlan((of_probs, of_v))
            elif site.kind == "product":
                plans[site.name] = SitePlan(
                    search.search_product(inputs[0], inputs[1], bits, gradient=gradient)
                )
        return plans

    @torch.inference_mode(False)
    def _gradients(self, images: Tensor) -> dict[str, Tensor]:
        """Return the gradient of the cross-entropy with the predicted class at every site's output."""
        outputs: dict[str, Tensor] = {}
        recorder = Recorder(self.module, [site.node for site in self.sites], outputs.__setitem__)
        with torch.enable_grad():
            logits = recorder.run(images.clone().requires_grad_())
            loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        found = torch.autograd.grad(loss, [outputs[site.node] for site in self.sites])
        return {site.name: gradient for site, gradient in zip(self.sites, found, strict=True)}

    # choices ----------------------------------------------------------------------------------------------------

    def _error(self, plans: Mapping[str, SitePlan]) -> float:
        """Return the relative error of the logits with these plans."""
        simulator = Simulator(self.module, self.sites, plans)
        out = torch.cat([simulator.run(x) for x in self.batches])
        return float((out - self.logits).norm() / self.logits.norm())

    def _errors(self, plans: Mapping[str, SitePlan], images: int = SENSITIVITY_IMAGES) -> dict[str, float]:
        """Return the relative error of the logits with each site alone quantized, on the first images."""
        first = torch.cat(self.batches)[:images].split(len(self.batches[0]))
        found = logit_errors(
            self.module, self.sites, {name: {"": plan} for name, plan in plans.items()}, first
        )
        return {name: of_site[""] for name, of_site in found.items()}

    def _noise(self, plans: Mapping[str, SitePlan]) -> dict[str, float]:
        """Return each site's signal to noise ratio in dB on the first batch, its inputs exact."""
        found: dict[str, float] = {}

        def compare(name: str, exact: Tensor, quantized: Tensor) -> None:
            noise = (quantized - exact).square().sum() / exact.square().sum()
            found[name] = float(-10 * torch.log10(noise.clamp_min(1e-20)))

        Simulator(self.module, self.sites, plans, compare).run(self.batches[0])
        return found

    def _choose(
        self, plans: dict[str, SitePlan], measure: bool
    ) -> tuple[list[LayerReport], dict[str, SitePlan]]:
        """Leave the most harmful sites in floating point until the error budget holds."""
        noise, budget = self._noise(plans), self.recipe.error_budget
        exceeded = budget is not None and self._error(plans) > budget
        errors = self._errors(plans) if measure or exceeded else {}
        if budget is not None and exceeded:
            harmful = sorted(plans, key=lambda name: -errors[name])
            low, high = 0, len(harmful)  # the least number left in floating point lies above low
            while high - low > 1:
                middle = (low + high) // 2
                kept = {name: plans[name] for name in harmful[middle:]}
                low, high = (low, middle) if self._error(kept) <= budget else (middle, high)
            plans = {name: plan for name, plan in plans.items() if name not in harmful[:high]}
        return [self._report(site, plans, noise, errors) for site in self.all_sites], plans

    def _report(
        self,
        site: Site,
        plans: Mapping[str, SitePlan],
        noise: Mapping[str, float],
        errors: Mapping[str, float],
    ) -> LayerReport:
        plan = plans.get(site.name)
        mode = FLOAT if plan is None else "dynamic" if plan.dynamic else "static"
        if (
            plan is not None
            and self.recipe.reduce_range
            and plan.weight is not None
            and plan.weight.qmax > 63
        ):
            mode += " u8"
        return LayerReport(
            site.name,
            site.kind,
            None if plan is None else self.bits[site.name],
            mode,
            site.macs,
            noise.get(site.name),
            errors.get(site.name),
            self.alphas.get(site.name),
        )

    def _allocate(self) -> None:
        """Give each inner site a width by relevance, under the recipe's budget (LRP-QViT)."""
        recipe = self.recipe
        assert recipe.average_bits is not None
        inner = [site for site in self.sites if site.weight and self.bits[site.name] == recipe.weight_bits]
        with torch.inference_mode(False):
            model = copy.deepcopy(self.model).double().eval()
            images = torch.cat(self.batches)[:RELEVANCE_IMAGES].clone().double()
            scores = contribution_scores(model, images.split(1), [site.name for site in inner])
        seen = self._record({site.operands[0] for site in inner})
        errors: dict[str, dict[int, float]] = {}
        for site in inner:
            weight, found = get_tensor(self.module, str(site.weight)), seen[site.operands[0]]
            errors[site.name] = {
                bits: scores[site.name]
                * (
                    relative_error(weight, self._weight(site, bits))
                    + relative_error(found.values, self._activation(found, site.origins[0], bits))
                )
                for bits in recipe.mixed_bits
            }
        sizes = {
            site.name: site.macs
            if recipe.mixed_cost == "bitops"
            else get_tensor(self.module, str(site.weight)).numel()
            for site in inner
        }
        self.bits |= allocate(errors, sizes, recipe.mixed_bits, recipe.average_bits)


def dynamic_placeholder(bits: int) -> Uniform:
    """Return a quantizer that names a width; the scale of a dynamic site is found at each call."""
    return Uniform(torch.ones(()), torch.zeros(()), 0, 2**bits - 1)


def relative_error(x: Tensor, quantizer: Quantizer) -> float:
    """Return the squared error of a quantizer relative to the square of what it quantizes."""
    return float((x - quantizer(x)).square().sum() / x.square().sum())


def _plans_of(
    options: Mapping[str, Mapping[str, SitePlan]], choice: Mapping[str, str]
) -> dict[str, SitePlan]:
    return {name: options[name][mode] for name, mode in choice.items() if mode != FLOAT}


def _errors_of(errors: Mapping[str, Mapping[str, float]], choice: Mapping[str, str]) -> dict[str, float]:
    return {name: errors[name].get(mode, 0.0) for name, mode in choice.items()}


def _every(site: Site) -> bool:
    return True
