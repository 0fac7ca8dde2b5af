"""A chart as plain data, which `interactive` draws with plotly and `plots` with matplotlib."""

from __future__ import annotations

from dataclasses import dataclass, field

from vitzoo.benchmark.reporting.gather import Entry


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, with the unit, and whether it is logarithmic."""

    title: str
    log: bool = True


@dataclass(frozen=True)
class Mark:
    """A point: where it is, what it is called beside it, and the row that it stands for."""

    x: float
    y: float
    label: str
    entry: Entry


@dataclass(frozen=True)
class Group:
    """Points drawn alike.

    Attributes:
        key: name in the legend of what they are hidden and shown with.
        marks: the points; from left to right where they are joined.
        colour, shape: numbers of a colour and of a marker; a colour of None is grey.
        joined: whether a line joins them; `dashed` whether it is dashed.
    """

    key: str
    marks: list[Mark]
    colour: int | None
    shape: int
    joined: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Front:
    """A Pareto front: the points that no other of the same setting beats on both axes, from left to right."""

    key: str
    marks: list[Mark]
    colour: int | None


@dataclass(frozen=True)
class Arrow:
    """From one point to another of the same height, with what changed between them."""

    start: Mark
    end: Mark
    text: str


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: of its files and anchors.
        title: above it.
        says: sentences below the title.
        x, y: its axes.
        groups: points.
        shapes: family -> marker, where the marker tells more than the groups' keys.
        fronts, arrows: what is drawn besides.
        names: of the places 0, 1, ... on the y axis, from the top; none where it is an axis of numbers.
        empty: why there is nothing to draw, as a sentence; the rest does not count then.
    """

    name: str
    title: str
    says: list[str] = field(default_factory=list)
    x: Axis = Axis("")
    y: Axis = Axis("")
    groups: list[Group] = field(default_factory=list)
    shapes: dict[str, int] = field(default_factory=dict)
    fronts: list[Front] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    empty: str = ""
