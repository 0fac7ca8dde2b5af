"""What both drawings of a chart share: colours and markers by number, ticks of logarithmic axes."""

from __future__ import annotations

from collections.abc import Iterable

GREY = "#6b7280"
# dark enough to be read on white, and told apart by people who see colours differently
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#aa3377",
    "#8a6d00",
    "#332288",
    "#c1121f",
    "#117733",
    "#56789a",
    "#7a4a21",
)
# (plotly's name, matplotlib's)
SHAPES = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("x", "X"),
    ("triangle-down", "v"),
    ("cross", "P"),
    ("pentagon", "p"),
    ("hexagon", "h"),
    ("star", "*"),
    ("triangle-left", "<"),
    ("triangle-right", ">"),
)


def colour(number: int | None) -> str:
    """Return a colour; None is grey, and they repeat after the last."""
    return GREY if number is None else COLOURS[number % len(COLOURS)]


def shape(number: int) -> tuple[str, str, bool]:
    """Return a marker: plotly's name, matplotlib's, and whether it is filled, which those after the last are not."""
    return (*SHAPES[number % len(SHAPES)], number // len(SHAPES) % 2 == 0)


_INTEGERS = tuple(float(digit) for digit in range(1, 10))
# steps within a power of ten, from wide to narrow
_STEPS = (
    (1.0, 2.0, 5.0),
    _INTEGERS,
    tuple(n / 2 for n in range(2, 20)),
    tuple(n / 10 for n in range(10, 100)),
)
_MANY = 14


def ticks(values: Iterable[float]) -> list[float]:
    """Return the ticks of a logarithmic axis, a few of them among the values and the others for zooming out.

    Args:
        values: what the axis shows, above 0, at least one.
    """
    shown = list(values)
    low, high = min(shown), max(shown)
    for step in _STEPS:
        found = [round(digit * 10.0**power, 12) for power in range(-6, 9) for digit in step]
        inside = sum(low <= tick <= high for tick in found)
        if inside > _MANY:
            return [10.0**power for power in range(-6, 9)]
        if inside >= 3:
            return found
    return found
