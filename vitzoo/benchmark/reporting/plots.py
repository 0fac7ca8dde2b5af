"""A chart as a PNG file, by matplotlib."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitzoo.benchmark.reporting.chart import Chart, Group, Mark
from vitzoo.benchmark.reporting.style import GREY, colour, shape, ticks

_SIZE = (9.0, 5.6)  # inches
_DOTS = 150  # an inch
_LABEL = 7.5  # points


def write_plot(chart: Chart, path: Path, footer: str) -> None:
    """Draw a chart that has something to draw.

    Args:
        chart: what to draw.
        path: the file.
        footer: where the rows are from, below the chart.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(2.4, 1.5 + 0.62 * len(chart.names)) if chart.names else _SIZE[1]
    fig = Figure(figsize=(_SIZE[0], height), dpi=_DOTS, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.add_subplot()
    _draw_points(axes, chart)
    _draw_axes(axes, chart)
    _draw_arrows(axes, chart)
    if not chart.names:
        _draw_legend(axes, chart)
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
    fig.supxlabel(footer, x=0.01, ha="left", fontsize=6.5, color=GREY)
    if chart.groups and not chart.groups[0].joined and not chart.names:
        fig.canvas.draw()  # the labels' places depend on the final axes
        _draw_labels(axes, chart)
    part = path.with_name(f".{path.name}.part")
    try:
        fig.savefig(part, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw_points(axes: Any, chart: Chart) -> None:
    for front in chart.fronts:
        xs, ys = _places(front.marks)
        axes.plot(xs, ys, linestyle=":", linewidth=1.3, color=colour(front.colour), zorder=1)
    for group in chart.groups:
        xs, ys = _places(group.marks)
        line = ("--" if group.dashed else "-") if group.joined else "none"
        axes.plot(
            xs, ys, linestyle=line, linewidth=1.8, label=group.key, **_marker(group.colour, group.shape)
        )


def _places(marks: Sequence[Mark]) -> tuple[list[float], list[float]]:
    return [mark.x for mark in marks], [mark.y for mark in marks]


def _marker(number: int | None, which: int) -> dict[str, Any]:
    _, name, filled = shape(which)
    face = colour(number) if filled else "white"
    edge = "white" if filled else colour(number)
    style = {
        "marker": name,
        "markersize": 7,
        "markeredgecolor": edge,
        "markeredgewidth": 0.7 + 0.7 * (not filled),
    }
    return style | {"markerfacecolor": face, "color": colour(number), "zorder": 3}


def _draw_axes(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    xs, ys = _places([mark for group in chart.groups for mark in group.marks])
    for axis, what, values in ((axes.xaxis, chart.x, xs), (axes.yaxis, chart.y, ys)):
        if what.log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(FixedLocator(ticks(values)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    if chart.groups and chart.groups[0].joined:
        axes.set_xticks(sorted(set(xs)))
    if chart.names:
        axes.set_yticks(range(len(chart.names)), chart.names)
        axes.set_ylim(len(chart.names) - 0.4, -0.6)
    axes.margins(x=0.08, y=None if chart.names else 0.08)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_arrows(axes: Any, chart: Chart) -> None:
    for arrow in chart.arrows:
        ends = (arrow.end.x, arrow.end.y), (arrow.start.x, arrow.start.y)
        style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 5, "shrinkB": 5, "linewidth": 1.4}
        axes.annotate("", *ends, arrowprops=style)
        middle = (arrow.start.x * arrow.end.x) ** 0.5, arrow.start.y
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(arrow.text, middle, **above)


def _draw_legend(axes: Any, chart: Chart) -> None:
    """Draw the legend beside the axes: what groups are called, and the families where their markers tell more."""
    from matplotlib.lines import Line2D

    if chart.shapes:
        keys = {group.key: group.colour for group in chart.groups}
        lines = [Line2D([], [], linestyle="none", label=_folded(k), **_marker(c, 0)) for k, c in keys.items()]
        lines += [
            Line2D([], [], linestyle="none", label=k, **_marker(None, s)) for k, s in chart.shapes.items()
        ]
    else:
        lines = [_legend_line(group) for group in {g.key: g for g in chart.groups}.values()]
    if chart.fronts:
        lines.append(Line2D([], [], linestyle=":", color=GREY, label="Pareto front"))
    below = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 8}
    axes.legend(handles=lines, **below)


def _legend_line(group: Group) -> Any:
    from matplotlib.lines import Line2D

    line: Any = ("--" if group.dashed else "-") if group.joined else "none"
    return Line2D([], [], linestyle=line, label=_folded(group.key), **_marker(group.colour, group.shape))


def _folded(key: str) -> str:
    return textwrap.fill(key, 30)


def _draw_labels(axes: Any, chart: Chart) -> None:
    """Draw labels that cover neither each other nor a mark; one without room is left to the page."""
    import textalloc

    marks = [mark for group in chart.groups for mark in group.marks]
    xs, ys = _places(marks)
    fronts: Any = [_places(front.marks) for front in chart.fronts] or None
    textalloc.allocate(
        axes,
        xs,
        ys,
        [mark.label for mark in marks],
        x_scatter=xs,
        y_scatter=ys,
        x_lines=fronts and [xs for xs, _ in fronts],
        y_lines=fronts and [ys for _, ys in fronts],
        textsize=_LABEL,
        textcolor="#374151",
        linecolor="#9ca3af",
        linewidth=0.5,
        min_distance=0.012,
        max_distance=0.12,
        draw_all=False,
    )
