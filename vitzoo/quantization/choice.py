"""Which way each layer is quantized: the fastest whose errors together stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

FLOAT = "float"
MARGIN = 1.02  # what a file has to be faster by to count as faster: the default of the gate
CERTAIN = 1.15  # above it one measurement is enough


@dataclass(frozen=True)
class Cost:
    """What one way of running a layer costs.

    Attributes:
        ms: time of the layer for a batch.
        logit_error: relative error of the logits, this layer alone quantized.
    """

    ms: float
    logit_error: float


@dataclass(frozen=True)
class Step:
    """A change of one layer to an option of less error and more time.

    Attributes:
        layer: which.
        option: what it changes to.
        price: milliseconds a unit of squared error that it takes away.
    """

    layer: str
    option: str
    price: float


def choose(
    costs: Mapping[str, Mapping[str, Cost]],
    budget: float,
    error_of: Callable[[Mapping[str, str]], float],
    macs: Mapping[str, int],
    least_integer_macs: int = 0,
) -> dict[str, str]:
    """Return an option for each layer: the least time whose error holds the budget.

    Errors of layers add up as squares, nearly, so the best choices are those that minimise time + price x squared error
    at some price: from the fastest options on, steps to options of less error are taken in the order of their price.
    How many is decided by the error that the whole network is measured to have. Where the fastest options leave too
    few products to integers, those in floating point that lose the least time a product become integers first.

    Args:
        costs: layer -> option -> cost; each layer has the option `FLOAT`, whose error is 0.
        budget: relative logit error that all layers together may have.
        error_of: the measured error of a choice.
        macs: multiply-accumulates of each layer.
        least_integer_macs: how many are to be integers, unless the budget forbids it.

    Returns:
        layer -> option. The same measurements give the same choice; of equal options the first wins.
    """
    chosen = {layer: min(options, key=lambda o: options[o].ms) for layer, options in costs.items()}
    for layer, option in _to_integers(costs, chosen, macs, least_integer_macs):
        chosen[layer] = option
    steps = sorted(
        (step for layer in costs for step in _steps(layer, costs[layer], chosen[layer])),
        key=lambda step: step.price,
    )

    def after(count: int) -> dict[str, str]:
        return chosen | {step.layer: step.option for step in steps[:count]}

    low, high = -1, len(steps)  # the last choice has no error; the least number that holds lies above low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(after(middle)) <= budget else (middle, high)
    return after(high)


def fastest_file(
    chosen: Mapping[str, str],
    costs: Mapping[str, Mapping[str, Cost]],
    holds: Callable[[Mapping[str, str]], bool],
    speeds_of: Callable[[Sequence[Mapping[str, str]]], Sequence[float]],
) -> tuple[dict[str, str], float]:
    """Return the choice whose whole file is the fastest: the one given, a near one, or all in floating point.

    A layer timed by itself does not know its neighbours. In the whole file those in floating point lose the layout and
    the fusions that they had, and static ones pass codes on to each other. Whole files are therefore timed of the
    choice and of the same with static scales. Where neither is faster than floating point, layers return to it, those
    that save least by themselves first, until a half, a quarter and an eighth of the integer layers are left.

    Args:
        chosen: layer -> option, from `choose`.
        costs: layer -> option -> cost.
        holds: whether a choice holds the error budget.
        speeds_of: the measured speed of each choice's whole file relative to the float file.

    Returns:
        layer -> option, and the speed of the fastest file with integers: the lesser of two measurements unless it is
        above `CERTAIN`, and 0.0 where nothing was in integers to begin with. All options are `FLOAT` where it is below
        `MARGIN`.
    """
    floating = dict.fromkeys(chosen, FLOAT)
    integers = [layer for layer, option in chosen.items() if option != FLOAT]
    if not integers:
        return floating, 0.0
    candidates = [dict(chosen)]
    static = {layer: _static(option, costs[layer]) for layer, option in chosen.items()}
    if static != candidates[0] and holds(static):
        candidates.append(static)
    found, speed = _surely_fastest(candidates, [*speeds_of(candidates)], speeds_of)
    if speed >= MARGIN:
        return found, speed
    integers.sort(key=lambda layer: costs[layer][chosen[layer]].ms - costs[layer][FLOAT].ms)
    counts = [count for part in (2, 4, 8) if (count := len(integers) // part)]
    thinner = [floating | {layer: found[layer] for layer in integers[:count]} for count in counts]
    thinner = [choice for choice in thinner if holds(choice)]
    if thinner:
        other, other_speed = _surely_fastest(thinner, [*speeds_of(thinner)], speeds_of)
        if other_speed >= MARGIN:
            return other, other_speed
        speed = max(speed, other_speed)
    return floating, speed


def _surely_fastest(
    candidates: Sequence[dict[str, str]],
    speeds: list[float],
    speeds_of: Callable[[Sequence[Mapping[str, str]]], Sequence[float]],
) -> tuple[dict[str, str], float]:
    """Return the first choice that no later one exceeds by `MARGIN`, and its speed.

    The fastest of several is so by chance too: one between `MARGIN` and `CERTAIN` is measured once more.
    """
    again: set[int] = set()
    while True:
        best = 0
        for i, speed in enumerate(speeds):
            best = i if speed > MARGIN * speeds[best] else best
        if best in again or not MARGIN <= speeds[best] < CERTAIN:
            return candidates[best], speeds[best]
        again.add(best)
        speeds[best] = min(speeds[best], *speeds_of([candidates[best]]))


def _static(option: str, options: Mapping[str, Cost]) -> str:
    static = option.replace("dynamic", "static")
    return static if static in options else option


def _to_integers(
    costs: Mapping[str, Mapping[str, Cost]],
    chosen: Mapping[str, str],
    macs: Mapping[str, int],
    least: int,
) -> list[tuple[str, str]]:
    """Return (layer, option) of the layers that have to leave floating point, the cheapest a product first."""
    missing = least - sum(macs[layer] for layer, option in chosen.items() if option != FLOAT)
    candidates = []
    for layer, option in chosen.items():
        integers = {name: cost for name, cost in costs[layer].items() if name != FLOAT}
        if option == FLOAT and integers:
            best = min(integers, key=lambda name: integers[name].ms)
            candidates.append(((integers[best].ms - costs[layer][FLOAT].ms) / macs[layer], layer, best))
    found = []
    for _, layer, option in sorted(candidates, key=lambda c: c[0]):
        if missing <= 0:
            break
        found.append((layer, option))
        missing -= macs[layer]
    return found


def _steps(layer: str, options: Mapping[str, Cost], start: str) -> list[Step]:
    """Return the steps along the lower convex hull of time over squared error, from an option on."""
    steps: list[Step] = []
    now = start
    while True:
        here = options[now]
        best: tuple[float, float, str] | None = None
        for name, cost in options.items():
            saved = here.logit_error**2 - cost.logit_error**2
            if saved <= 0:
                continue
            candidate = (max(0.0, cost.ms - here.ms) / saved, cost.logit_error, name)
            best = candidate if best is None or candidate[:2] < best[:2] else best
        if best is None:
            return steps
        price = max(best[0], steps[-1].price if steps else 0.0)
        steps.append(Step(layer, best[2], price))
        now = best[2]


def reason(costs: Mapping[str, Cost], option: str) -> str:
    """Return in words why an option was chosen over the fastest one."""
    fastest = min(costs, key=lambda name: costs[name].ms)
    if option == fastest:
        return "the fastest"
    quick, taken = costs[fastest], costs[option]
    slower = f"{fastest} takes {quick.ms:.3f} ms, {option} {taken.ms:.3f} ms"
    if taken.logit_error < quick.logit_error or math.isnan(quick.logit_error):
        return (
            f"the error budget: {slower}, and their logit errors are {quick.logit_error:.2%} "
            f"and {taken.logit_error:.2%}"
        )
    return f"integer coverage: {slower}"
