"""Quantizes a trained model by a recipe: capture, calibrate, transform, choose, and hand back a model that runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from vitzoo.quantization.captured import Captured
from vitzoo.quantization.choice import FLOAT, Cost, choose, fastest_file, reason
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.fitting import dynamic_placeholder, fit_plans, symmetric_weight, widths_by_relevance
from vitzoo.quantization.graph import Site
from vitzoo.quantization.migration import move_scales
from vitzoo.quantization.model import LayerReport, QuantizedModel
from vitzoo.quantization.rounding import improved
from vitzoo.quantization.simulate import SitePlan
from vitzoo.quantization.sweep import logit_errors

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
    captured = Captured(model, recipe, list(calibration_batches), filter_fn, progress)
    with torch.inference_mode():
        if recipe.activations == "auto":
            return _automatic(captured, clock, race)
        plans = _planned(captured)
        captured.tell("measure each layer")
        layers, plans = _choose(captured, plans, measure_layers)
        error = captured.error(plans)
    return QuantizedModel(recipe, captured.module, captured.all_sites, plans, layers, error)


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
    captured = Captured(model, recipe, list(calibration_batches), filter_fn, progress)
    with torch.inference_mode():
        plans = _planned(captured)
        captured.tell("measure each layer")
        noise, errors = captured.noise(plans), captured.errors(plans, images)
    return tuple(_report(captured, site, plans, noise, errors) for site in captured.all_sites)


def _planned(captured: Captured) -> dict[str, SitePlan]:
    """Transform the graph and return the plan of every site."""
    fixed = move_scales(captured)
    if captured.recipe.mixed_bits:
        captured.tell("weigh layers by relevance")
        captured.bits |= widths_by_relevance(captured)
    captured.tell("fit quantizers")
    plans = fit_plans(captured, fixed)
    found = improved(captured, {name: {"": plan} for name, plan in plans.items()})
    return {name: of_site[""] for name, of_site in found.items()}


def _automatic(captured: Captured, clock: Clock | None, race: Race | None) -> QuantizedModel:
    """Choose each site's mode by its measured time and error."""
    recipe = captured.recipe
    if clock is None:
        raise ValueError(
            f"recipe {recipe.name!r} chooses by the time of each layer: call vitzoo.quantize, which measures it in "
            "ONNX Runtime, or give a clock"
        )
    assert recipe.error_budget is not None
    fixed = move_scales(captured)
    captured.tell("fit quantizers")
    options = improved(
        captured,
        {
            name: _options(captured, captured.by_name[name], plan)
            for name, plan in fit_plans(captured, fixed).items()
        },
    )
    captured.tell("time each layer in each mode")
    times = clock(
        captured.module, captured.sites, captured.batches[0], {name: [*o] for name, o in options.items()}
    )
    captured.tell("measure each layer in each mode")
    first = captured.first(CHOICE_IMAGES)
    errors = logit_errors(captured.module, captured.sites, options, first)
    costs = {
        name: {
            mode: Cost(ms, errors[name][mode] if mode != FLOAT else 0.0) for mode, ms in times[name].items()
        }
        for name in options
    }
    captured.tell("choose under the error budget")
    macs = {site.name: site.macs for site in captured.all_sites}
    by_layer = choose(
        costs,
        recipe.error_budget,
        lambda choice: captured.error(_plans_of(options, choice)),
        macs,
        round(LEAST_INTEGER_SHARE * sum(macs.values())),
    )
    chosen, why_float = by_layer, None
    if race is not None:
        captured.tell("time whole files")
        chosen, why_float = _raced(captured, race, by_layer, costs, options)
    plans = _plans_of(options, chosen)
    noise, alone = captured.noise(plans), _errors_of(errors, chosen)
    layers = []
    for site in captured.all_sites:
        report = _report(captured, site, plans, noise, alone)
        if site.name in costs:
            why = reason(costs[site.name], by_layer[site.name])
            if chosen[site.name] != by_layer[site.name]:
                why = why_float or f"the whole file, which is faster than with {by_layer[site.name]} here"
            report = dataclasses.replace(report, costs=costs[site.name], why=why)
        layers.append(report)
    return QuantizedModel(
        recipe, captured.module, captured.all_sites, plans, layers, captured.error(plans), why_float
    )


def _raced(
    captured: Captured,
    race: Race,
    chosen: Mapping[str, str],
    costs: Mapping[str, Mapping[str, Cost]],
    options: Mapping[str, Mapping[str, SitePlan]],
) -> tuple[dict[str, str], str | None]:
    """Return the choice whose whole file is the fastest, and why it is floating point if it is."""
    budget = captured.recipe.error_budget
    assert budget is not None

    def speeds_of(choices: Sequence[Mapping[str, str]]) -> Sequence[float]:
        plans = [_plans_of(options, choice) for choice in choices]
        return race(
            [QuantizedModel(captured.recipe, captured.module, captured.all_sites, p, (), 0.0) for p in plans]
        )

    def holds(choice: Mapping[str, str]) -> bool:
        return captured.error(_plans_of(options, choice)) <= budget

    found, speed = fastest_file(chosen, costs, holds, speeds_of)
    if set(found.values()) != {FLOAT}:
        return found, None
    tried = (
        f"the best file with layers in integers had {speed:.2f} times its speed"
        if speed
        else "each layer in integers is slower by itself or exceeds it"
    )
    return found, f"float is the fastest that holds the error budget of {budget:.1%}: {tried}"


def _options(captured: Captured, site: Site, static: SitePlan) -> dict[str, SitePlan]:
    """Return the modes of a site that runtimes run in integers."""
    found = {"static": static}
    if site.kind != "conv" or site.pointwise:
        operands = tuple(dynamic_placeholder(8) for _ in site.operands)
        found["dynamic"] = SitePlan(operands, static.weight, dynamic=True)
    if captured.recipe.reduce_range and site.weight is not None:
        whole = symmetric_weight(captured, site, 8)
        found |= {f"{mode} u8": dataclasses.replace(plan, weight=whole) for mode, plan in found.items()}
    return found


def _choose(
    captured: Captured, plans: dict[str, SitePlan], measure: bool
) -> tuple[list[LayerReport], dict[str, SitePlan]]:
    """Leave sites in floating point until the error budget holds, those first that harm most for their products."""
    noise, budget = captured.noise(plans), captured.recipe.error_budget
    exceeded = budget is not None and captured.error(plans) > budget
    errors = captured.errors(plans, SENSITIVITY_IMAGES) if measure or exceeded else {}
    if budget is not None and exceeded:
        # squares of errors add up, nearly
        harmful = sorted(plans, key=lambda name: -(errors[name] ** 2) / captured.by_name[name].macs)
        low, high = 0, len(harmful)  # the least number left in floating point lies above low
        while high - low > 1:
            middle = (low + high) // 2
            kept = {name: plans[name] for name in harmful[middle:]}
            low, high = (low, middle) if captured.error(kept) <= budget else (middle, high)
        plans = {name: plan for name, plan in plans.items() if name not in harmful[:high]}
    return [_report(captured, site, plans, noise, errors) for site in captured.all_sites], plans


def _report(
    captured: Captured,
    site: Site,
    plans: Mapping[str, SitePlan],
    noise: Mapping[str, float],
    errors: Mapping[str, float],
) -> LayerReport:
    plan = plans.get(site.name)
    mode = FLOAT if plan is None else "dynamic" if plan.dynamic else "static"
    if (
        plan is not None
        and captured.recipe.reduce_range
        and plan.weight is not None
        and plan.weight.qmax > 63
    ):
        mode += " u8"
    return LayerReport(
        site.name,
        site.kind,
        None if plan is None else captured.bits[site.name],
        mode,
        site.macs,
        noise.get(site.name),
        errors.get(site.name),
        captured.alphas.get(site.name),
    )


def _plans_of(
    options: Mapping[str, Mapping[str, SitePlan]], choice: Mapping[str, str]
) -> dict[str, SitePlan]:
    return {name: options[name][mode] for name, mode in choice.items() if mode != FLOAT}


def _errors_of(errors: Mapping[str, Mapping[str, float]], choice: Mapping[str, str]) -> dict[str, float]:
    return {name: errors[name].get(mode, 0.0) for name, mode in choice.items()}
