"""Chooses a bit width for each layer under a budget, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def allocate(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    bits: Sequence[int],
    average: float,
) -> dict[str, int]:
    """Return the width of each layer that minimises the summed error under a budget of bits.

    Minimises sum_l errors[l][b_l] subject to sum_l sizes[l] b_l <= average * sum_l sizes[l], by dynamic programming
    over the budget. Equal sums give more bits to the earlier layer.

    Args:
        errors: layer -> width -> error, already weighted by the layer's relevance.
        sizes: layer -> weights, or MACs for a budget of bit operations.
        bits: widths to choose from.
        average: budget, bits an element.

    Raises:
        ValueError: a budget below the least width, or sizes that are not positive.
    """
    names, widths = list(errors), sorted(set(bits))
    if not widths or average < widths[0]:
        raise ValueError(f"average is {average} bits, below the least of {widths}")
    if any(sizes[name] < 1 for name in names):
        raise ValueError("every size must be positive")
    unit = math.gcd(*(sizes[name] for name in names))
    budget = math.floor(average * sum(sizes[name] for name in names) / unit + 1e-9)
    # from the last layer to the first: spent -> (error, widths of the layers from here on); only undominated states
    states: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for name in reversed(names):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (error, chosen) in states.items():
            for width in reversed(widths):
                cost = spent + sizes[name] // unit * width
                if cost > budget:
                    continue
                candidate = (error + errors[name][width], (width, *chosen))
                if cost not in found or _better(candidate, found[cost]):
                    found[cost] = candidate
        states = _undominated(found)
    best = states[min(states, key=lambda spent: (states[spent][0], [-w for w in states[spent][1]]))]
    return dict(zip(names, best[1], strict=True))


def _better(a: tuple[float, tuple[int, ...]], b: tuple[float, tuple[int, ...]]) -> bool:
    return (a[0], [-w for w in a[1]]) < (b[0], [-w for w in b[1]])


def _undominated(
    states: dict[int, tuple[float, tuple[int, ...]]],
) -> dict[int, tuple[float, tuple[int, ...]]]:
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    least = math.inf
    for spent in sorted(states):
        if states[spent][0] < least:
            kept[spent], least = states[spent], states[spent][0]
    return kept
