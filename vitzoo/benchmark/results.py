"""Result files: JSON Lines as the truth, written row by row; CSV in timm's columns and tables as views.

`docs/benchmarking.md` describes every field.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

SCHEMA_VERSION = 1
Row = dict[str, Any]
KINDS = ("header", "result", "claim", "validation")

# timm's tables, in their order
TIMM_COLUMNS = {
    "infer": (
        "model",
        "infer_img_size",
        "infer_samples_per_sec",
        "infer_step_time",
        "infer_batch_size",
        "param_count",
        "infer_gmacs",
    ),
    "train": (
        "model",
        "train_samples_per_sec",
        "train_step_time",
        "train_batch_size",
        "train_img_size",
        "param_count",
    ),
    "validate": (
        "model",
        "top1",
        "top1_err",
        "top5",
        "top5_err",
        "param_count",
        "img_size",
        "crop_pct",
        "interpolation",
    ),
}
# what the tables are sorted by, the largest first
_BEST = {"infer": "infer_samples_per_sec", "train": "train_samples_per_sec", "validate": "top1"}


def passes_of(row: Row) -> list[list[float]]:
    """Return the samples of a row, seconds a call in the order of the rounds, a list a pass."""
    samples, ends = row["samples_s"], np.cumsum(row.get("samples_passes", [len(row["samples_s"])]))
    return [part.tolist() for part in np.split(np.asarray(samples), ends[:-1])]


@dataclass
class Results:
    """What a benchmark found.

    Attributes:
        header: machine, versions, load and settings.
        rows: one a case, in the order they were finished; one with "error" did not work.
        claims: of a suite, one a claim.
    """

    header: Row
    rows: list[Row] = field(default_factory=list)
    claims: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """The rows with an error."""
        return [row for row in self.rows if "error" in row]

    def frame(self) -> Any:
        """Return the rows as a pandas.DataFrame, samples left out."""
        return frame(self.rows)


def frame(rows: Iterable[Row]) -> Any:
    """Return rows as a pandas.DataFrame, samples left out."""
    import pandas

    return pandas.DataFrame([{k: v for k, v in row.items() if k != "samples_s"} for row in rows])


class Recorder:
    """A result file that grows by whole rows, so that an interrupted run leaves the finished ones.

    Args:
        path: the file; None writes nothing.
        force: replace a file that exists.

    Raises:
        FileExistsError: the file exists and `force` is off.
        OSError: it cannot be written; found before anything is measured.
    """

    def __init__(self, path: str | os.PathLike[str] | None, force: bool = False) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        target = Path(path)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the output is a folder; name a file in it", str(target))
        if not target.parent.exists():
            raise FileNotFoundError(
                errno.ENOENT, "the output's folder does not exist; create it first", str(target.parent)
            )
        try:
            self._file = target.open("w" if force else "x", encoding="utf-8")
        except FileExistsError as error:
            raise FileExistsError(
                errno.EEXIST, "the output exists; choose another or say --force (force=True)", str(target)
            ) from error
        except OSError as error:
            raise type(error)(
                error.errno, f"the output cannot be written ({error.strerror})", str(target)
            ) from error

    def write(self, row: Row) -> None:
        """Append a row and see it to the disk."""
        if self._file is not None:
            # JSON has no NaN or infinity, and other readers of these files stop at one
            self._file.write(json.dumps(row, allow_nan=False, default=str) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, Row]]:
    """Read every row of a result file, in order, with the number of its line, from 1.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is not a row of ours, with its number; no line that is a header; not a text file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such result file; `vitzoo bench -o FILE` writes one", os.fspath(path)
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file, so no result file of vitzoo") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            KINDS.index(row["kind"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of a vitzoo result file") from error
        if row.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{path}, line {number}: schema_version {row.get('schema_version')}, this vitzoo reads {SCHEMA_VERSION}"
            )
        rows.append((number, row))
    if not any(row["kind"] == "header" for _, row in rows):
        raise ValueError(f"{path}: no header row, so nothing says on what machine this was measured")
    return rows


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a result file; several written one after another into one file are read as one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is not a row of ours, or none that is a header.
    """
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for _, row in read_rows(path):
        found[row["kind"]].append(row)
    return Results(found["header"][0], found["result"], found["claim"])


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Write the rows that worked as timm's tables are: its columns first, the fastest or most accurate model first.

    Raises:
        OSError: the file cannot be written.
    """
    table = frame(row for row in rows if "error" not in row)
    modes = dict.fromkeys(table["mode"]) if len(table) else {"infer": None}
    first = list(dict.fromkeys(column for mode in modes for column in TIMM_COLUMNS[mode]))
    others = [column for column in table.columns if column not in first]
    table = table.reindex(columns=[*first, *others])
    if len(table):
        table = table.sort_values(_BEST[next(iter(modes))], ascending=False, kind="stable")
    table.to_csv(path, index=False)
