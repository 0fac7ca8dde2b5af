"""The page of a report: one HTML file with everything in it, plotly's JavaScript too."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from vitzoo.benchmark.reporting.chart import Chart
from vitzoo.benchmark.reporting.gather import Accuracy, Entry, Gathered
from vitzoo.benchmark.reporting.interactive import figure
from vitzoo.benchmark.view import claims_table, setting, table


def render_page(found: Gathered, charts: list[Chart]) -> str:
    """Return the page.

    Args:
        found: the rows.
        charts: what to draw; those with nothing to draw are left out with their sentence.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    here = files("vitzoo.benchmark.reporting")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(here.joinpath("page.html.j2").read_text("utf-8"))
    drawn = [chart for chart in charts if not chart.empty]
    return template.render(
        found=found,
        charts=charts,
        figures={chart.name: _embedded(figure(chart).to_json()) for chart in drawn},
        claims=_claims(found),
        table=_table(found.entries) if found.entries else None,
        rows=[(entry, setting(entry.row), json.dumps(entry.row, indent=1)) for entry in _all(found)],
        sources=_sources(found),
        plotly=get_plotlyjs() if drawn else "",
        script=here.joinpath("page.js").read_text("utf-8") if drawn else "",
    )


def _embedded(document: str) -> str:
    """Return JSON as it may stand in a script element: nothing in it ends the element."""
    return document.replace("<", "\\u003c")


def _all(found: Gathered) -> list[Entry]:
    return sorted([*found.entries, *found.failed], key=lambda entry: entry.number)


def _claims(found: Gathered) -> list[dict[str, Any]]:
    """Return the claims as the command line shows them, with source and place."""
    cells = claims_table([claim for _, claim in found.claims]).to_dict("records")
    return [
        {**cell, "source": claim["source"], "place": place}
        for cell, (place, claim) in zip(cells, found.claims, strict=True)
    ]


def _table(entries: list[Entry]) -> dict[str, Any]:
    """Return title, columns and (entry, cells) of the rows that worked."""
    title, frame = table([entry.row for entry in entries])
    return {
        "title": title,
        "columns": list(frame.columns),
        "rows": list(zip(entries, frame.values.tolist(), strict=True)),
    }


def _sources(found: Gathered) -> list[tuple[str, Accuracy]]:
    """Return (model, published accuracy) of the rows that have one, each once."""
    several = {e.row["model"]: e.published for e in found.entries if isinstance(e.published, Accuracy)}
    return sorted(several.items())
