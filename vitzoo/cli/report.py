"""`vitzoo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitzoo.cli.common import Json, app, explained, print_json, stderr


@app.command(
    epilog="Examples: `vitzoo report results.jsonl` · `vitzoo report a.jsonl b.jsonl -o both.html --png plots`"
)
def report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of `vitzoo bench`, of one machine or of several.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file; report.html if neither this nor --png is given."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Folder for one PNG file a chart; made if it does not exist.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    json: Json = False,
) -> None:
    """Write result files as one HTML page with interactive charts, and as PNG plots."""
    if output is None and png is None:
        output = Path("report.html")
    with explained():
        from vitzoo.benchmark.reporting import report as write

        written = write(results, output, png=png, force=force)
    if json:
        print_json({"written": [str(path) for path in written]})
    else:
        stderr.print("\n".join(f"wrote {path}" for path in written), markup=False, soft_wrap=True)
