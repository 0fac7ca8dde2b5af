"""`vitzoo.benchmark.report(...)`: result files as one HTML page with interactive charts, and as PNG plots."""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from vitzoo.benchmark.reporting.charts import charts
from vitzoo.benchmark.reporting.gather import Gathered, gather
from vitzoo.export.files import scratch_folder, write_text

__all__ = ["report"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def report(
    results: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    png: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write what result files hold as a page, as plots, or both.

    The page needs nothing else and no network: charts of throughput against published accuracy and against
    multiply-accumulates, of latency and memory over the resolution, of floating point against int8; the claims
    of suites; every row with its file and line; machines, versions and load.

    Args:
        results: one JSON Lines file of `vitzoo.benchmark`, or several, of one machine or of several.
        output: the HTML file; none is written if None.
        png: folder for one PNG file a chart; made if it does not exist; none are written if None.
        force: replace files that exist.

    Returns:
        The files written.

    Raises:
        ImportError: plotly, Jinja2, matplotlib or textalloc is missing; the message has the line that installs them.
        FileNotFoundError: a result file, or the output's folder, that does not exist.
        FileExistsError: an output exists and `force` is off; nothing is written then.
        ValueError: a line that is no row, with its number; files without rows; neither `output` nor `png`.
        OSError: an output that cannot be written.
    """
    if output is None and png is None:
        raise ValueError("name an output: an HTML file (output), a folder for PNG files (png), or both")
    _require_packages(output is not None, png is not None)
    found = gather([results] if isinstance(results, (str, os.PathLike)) else list(results))
    every = charts(found.entries)
    drawn = [chart for chart in every if not chart.empty]
    page = None if output is None else Path(output)
    plots = [] if png is None else [Path(png) / f"{chart.name}.png" for chart in drawn]
    _check_outputs(page, None if png is None else Path(png), plots, force)
    if page is not None:
        from vitzoo.benchmark.reporting.page import render_page

        write_text(page, render_page(found, every))
    if png is not None:
        from vitzoo.benchmark.reporting.plots import write_plot

        Path(png).mkdir(parents=True, exist_ok=True)
        for chart, path in zip(drawn, plots, strict=True):
            write_plot(chart, path, _footer(found))
    return [*([page] if page is not None else []), *plots]


def _require_packages(page: bool, plots: bool) -> None:
    needed = ("plotly", "jinja2") * page + ("matplotlib", "textalloc") * plots
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"the report needs {', '.join(missing)}, not installed here: pip install 'vitzoo[report]'"
        )


def _check_outputs(page: Path | None, folder: Path | None, plots: Sequence[Path], force: bool) -> None:
    """Find out before anything is written what cannot be."""
    for path in [*([page] if page is not None else []), *plots]:
        if path.is_file() and not force:
            raise FileExistsError(
                errno.EEXIST, "the output exists; choose another or say --force (force=True)", str(path)
            )
    if folder is not None and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is a file, not a folder for the plots", str(folder))
    if page is not None:
        with scratch_folder(page):
            pass


def _footer(found: Gathered) -> str:
    """Return where and when the rows of a plot were measured."""
    machines = list(dict.fromkeys(run.machine for run in found.runs))
    days = sorted({str(run.header["machine"].get("time"))[:10] for run in found.runs} - {"None"})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
    said = f"{', '.join(found.files)}; {'; '.join(machines)}; {when}"
    return said if len(said) < 180 else said[:177] + "..."
