"""Rows as a table for people: what is the same everywhere goes into the title, the rest into columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitzoo.benchmark.claims import in_words
from vitzoo.benchmark.results import Row

# field of a row as `plain` gives it -> heading, for the settings that a sweep may vary
SETTINGS = {
    "mode": "mode",
    "runtime": "runtime",
    "precision": "dtype",
    "layout": "layout",
    "attention": "attention",
    "device": "device",
    "threads": "threads",
    "img_size": "pixels",
    "batch_size": "batch",
}
UNREMARKABLE = {"mode": "infer", "layout": "contiguous", "attention": "default", "device": "cpu"}


def plain(row: Row) -> Row:
    """Return the row with its settings under names that do not depend on the mode."""
    size = row.get(f"{row['mode']}_img_size", row["requested_img_size"])
    shown = "x".join(map(str, size)) if isinstance(size, list) else size
    return {**row, "img_size": shown, "batch_size": row["requested_batch_size"]}


def table(rows: Sequence[Row]) -> tuple[str, Any]:
    """Return a title and a pandas.DataFrame of formatted cells; empty cells are None.

    Args:
        rows: of one result file, at least one.
    """
    import pandas

    every = [plain(row) for row in rows]
    working = [row for row in every if "error" not in row] or every
    varying = [name for name in SETTINGS if len({str(row[name]) for row in working}) > 1]
    fixed = {n: working[0][n] for n in SETTINGS if n not in varying and working[0][n] != UNREMARKABLE.get(n)}
    title = ", ".join(said(name, value) for name, value in fixed.items() if value is not None)
    frame = pandas.DataFrame([_cells(row, varying) for row in every], dtype=object)
    empty = [c for c in frame.columns if c not in ("model", "images/s", "ms") and frame[c].isna().all()]
    return title, frame.drop(columns=empty).astype(object).where(frame.notna(), None)


def setting(row: Row) -> str:
    """Return the settings of one row in a few words."""
    all_ = plain(row)
    values = {n: all_[n] for n in SETTINGS if all_[n] is not None and all_[n] != UNREMARKABLE.get(n)}
    return ", ".join(said(name, value) for name, value in values.items())


def said(name: str, value: Any) -> str:
    """Return the value of one setting in a word or two."""
    if name == "threads":
        return f"{value} thread" + "s" * (value != 1)
    return {"batch_size": f"batch {value}", "img_size": f"{value} pixels"}.get(name, str(value))


def _cells(row: Row, varying: Sequence[str]) -> Row:
    start = {"model": row["label"], **{SETTINGS[name]: row[name] for name in varying}}
    if "error" in row:
        return {**start, "images/s": row["error"]}
    mode = row["mode"]
    low, high = row.get("ratio_low"), row.get("ratio_high")
    return {
        **start,
        "images/s": _number(row[f"{mode}_samples_per_sec"]),
        "ms": _number(row[f"{mode}_step_time"]),
        "IQR ms": _number(row["iqr_ms"]),
        "p90 ms": _number(row["p90_ms"]),
        "p99 ms": _number(row["p99_ms"]),
        "ratio": _number(row.get("ratio")),
        "interval": None if low is None or high is None else f"{low:.2f}-{high:.2f}",
        "peak MiB": _number(row.get("peak_mem_mib")),
        "GMACs": _number(row.get("infer_gmacs")),
        "params (M)": _number(row.get("param_count")),
    }


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def claims_table(claims: Sequence[Row]) -> Any:
    """Return a pandas.DataFrame: each claim, what was measured, on what, and the verdict."""
    import pandas

    cells = []
    for claim in claims:
        interval = "" if claim["low"] is None else f" ({claim['low']:.2f}-{claim['high']:.2f})"
        measured = claim.get("reason") if claim["measured"] is None else f"{claim['measured']:.2f}{interval}"
        size = "own" if claim["img_size"] is None else claim["img_size"]
        on = f"batch {claim['requested_batch_size']}, {size} pixels, {said('threads', claim['threads'])}"
        row = {"claim": claim["text"], "figure": claim["figure"], "claimed": f"{claim['expected']:.2f}"}
        cells.append(row | {"measured": measured, "on": on, "verdict": in_words(claim)})
    return pandas.DataFrame(cells, dtype=object)
