"""A chart as a plotly figure for the page."""

from __future__ import annotations

import html
import textwrap
from typing import Any

from vitzoo.benchmark.reporting.chart import Arrow, Chart, Group
from vitzoo.benchmark.reporting.gather import Accuracy, Entry
from vitzoo.benchmark.reporting.style import GREY, colour, shape, ticks
from vitzoo.benchmark.view import setting

# field of a row -> (what the hover calls it, format)
_SHOWN = {
    "infer_samples_per_sec": ("images/s", "{:.4g}"),
    "p50_ms": ("p50 ms", "{:.4g}"),
    "iqr_ms": ("IQR ms", "{:.3g}"),
    "p90_ms": ("p90 ms", "{:.4g}"),
    "p99_ms": ("p99 ms", "{:.4g}"),
    "rounds": ("rounds", "{}"),
    "ratio": ("times as fast", "{:.3g}"),
    "ratio_to": ("as", "{}"),
    "peak_mem_mib": ("peak MiB", "{:.4g}"),
    "weight_mib": ("weights MiB", "{:.4g}"),
    "param_count": ("params (M)", "{:.4g}"),
    "infer_gmacs": ("GMACs", "{:.4g}"),
}
_WIDTH = 46  # characters a line of the hover, so that it fits a telephone
_LEGEND_LINE, _PLOT = 20, 400  # pixels
_NARROW_KEY = 16  # characters; two of these stand side by side on a telephone
_LABEL = 10.5  # pixels


def hover(entry: Entry) -> str:
    """Return what the pointer shows of a row, in plotly's markup."""
    row = entry.row
    facts = [f"{what} {form.format(row[k])}" for k, (what, form) in _SHOWN.items() if row.get(k) is not None]
    paragraphs = [row["model"]] if row["model"] != row["label"] else []
    paragraphs += [setting(row), ", ".join(facts)]
    paragraphs += [f"{op}: {', '.join(ran)}" for op, ran in (row.get("backends") or {}).items()]
    if isinstance(entry.published, Accuracy):
        paragraphs.append(f"published top-1 {entry.published.top1} ({entry.published.source})")
    paragraphs += [entry.machine, f"row: {entry.place}"]
    lines = [line for text in paragraphs for line in textwrap.wrap(text, _WIDTH, break_long_words=True)]
    return f"<b>{html.escape(row['label'])}</b><br>" + "<br>".join(html.escape(line) for line in lines)


def figure(chart: Chart) -> Any:
    """Return a chart that has something to draw as a plotly.graph_objects.Figure."""
    from plotly import graph_objects

    fig = graph_objects.Figure()
    for front in chart.fronts:
        fig.add_scatter(
            x=[mark.x for mark in front.marks],
            y=[mark.y for mark in front.marks],
            mode="lines",
            line={"color": colour(front.colour), "dash": "dot", "width": 1.5},
            name=html.escape(front.key),
            meta=[front.key],
            showlegend=front.colour is None,
            hoverinfo="skip",
        )
    seen: set[str] = set()
    for group in chart.groups:
        labelled = not (group.joined or chart.names)
        known = group.key in seen or bool(chart.shapes)
        fig.add_scatter(**_trace(group, labelled), meta=_keys(chart, group), showlegend=not known)
        seen.add(group.key)
    keys = {group.key: (group.colour, 0) for group in chart.groups}
    families = {name: (None, number) for name, number in chart.shapes.items()}
    for key, marker in [*keys.items(), *families.items()] if chart.shapes else ():
        fig.add_scatter(
            x=[None], y=[None], mode="markers", marker=_marker(*marker), name=html.escape(key), meta=[key]
        )
    for arrow in chart.arrows:
        _draw_arrow(fig, chart.names[int(arrow.start.y)], arrow)
    fig.update_layout(**_layout(chart, [trace.name for trace in fig.data if trace.showlegend is not False]))
    return fig


def _keys(chart: Chart, group: Group) -> list[str]:
    """Return the entries of the legend that hide a group: its own, and its family's where that has one."""
    return [group.key, *({mark.entry.family for mark in group.marks} & chart.shapes.keys())]


def _trace(group: Group, labelled: bool) -> dict[str, Any]:
    """Return the arguments of a trace; labels of points lie beside them, and a script keeps them apart."""
    return {
        "x": [mark.x for mark in group.marks],
        "y": [mark.y for mark in group.marks],
        "mode": "markers" + "+lines" * group.joined + "+text" * labelled,
        "text": [html.escape(mark.label) for mark in group.marks] if labelled else None,
        "textposition": "top center",
        "textfont": {"size": _LABEL, "color": "#374151"},
        "hovertext": [hover(mark.entry) for mark in group.marks],
        "hoverinfo": "text",
        "customdata": [mark.entry.number for mark in group.marks],
        "marker": _marker(group.colour, group.shape),
        "line": {"color": colour(group.colour), "width": 2, "dash": "dash" if group.dashed else "solid"},
        "name": html.escape(group.key),
        "cliponaxis": False,
    }


def _marker(number: int | None, which: int) -> dict[str, Any]:
    name, _, filled = shape(which)
    edge = {"width": 1, "color": "white"} if filled else {"width": 2, "color": colour(number)}
    return {
        "symbol": name if filled else f"{name}-open",
        "color": colour(number),
        "size": 10,
        "line": edge,
    }


def _draw_arrow(fig: Any, name: str, arrow: Arrow) -> None:
    """Draw an arrow, with its name and what changed above it from the left edge on, where there is always room."""
    fig.add_scatter(
        x=[arrow.start.x, arrow.end.x],
        y=[arrow.start.y, arrow.end.y],
        mode="lines+markers",
        line={"color": GREY, "width": 1.5},
        marker={"symbol": "arrow", "size": [0, 14], "angleref": "previous", "color": GREY, "standoff": 5},
        hoverinfo="skip",
        showlegend=False,
    )
    fig.add_annotation(
        text=f"{html.escape(name)}: <b>{arrow.text}</b>",
        x=0,
        xref="paper",
        xanchor="left",
        y=arrow.start.y,
        yshift=18,
        showarrow=False,
        font={"size": 12},
    )


def _layout(chart: Chart, keys: list[str]) -> dict[str, Any]:
    lines = len(keys) if max(map(len, keys)) > _NARROW_KEY else -(-len(keys) // 2)  # on a telephone
    axis = {"gridcolor": "#e5e7eb", "linecolor": "#9ca3af", "ticks": "outside", "zeroline": False}
    axis |= {"automargin": True, "showline": True, "tickfont": {"size": 11}}
    x = {**axis, "title": {"text": chart.x.title, "standoff": 8}}
    y = {**axis, "title": {"text": chart.y.title, "standoff": 6}}
    marks = [mark for group in chart.groups for mark in group.marks]
    for one, what, values in ((x, chart.x, [m.x for m in marks]), (y, chart.y, [m.y for m in marks])):
        if what.log:
            found = ticks(values)
            one |= {"type": "log", "tickmode": "array", "tickvals": found}
            one |= {"ticktext": [f"{tick:,g}" for tick in found]}
    if chart.x.log and chart.groups and chart.groups[0].joined:
        sides = sorted({mark.x for mark in marks})
        x |= {"tickvals": sides, "ticktext": [f"{side:g}" for side in sides]}
    height = _PLOT
    if chart.names:
        height = 90 + 56 * len(chart.names)
        y |= {"showticklabels": False, "ticks": "", "range": [len(chart.names) - 0.5, -0.7], "title": None}
    return {
        "template": "none",
        "height": height + _LEGEND_LINE * lines + 20,
        "margin": {"l": 8, "r": 18, "t": 36, "b": 8},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 11, "color": "#1b1f24"}},
        "xaxis": x,
        "yaxis": y,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
        | {"font": {"size": 12}, "itemwidth": 30, "maxheight": 0.9},
    }
