"""What both drawings of a chart share: colours and markers by number."""

from __future__ import annotations

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
