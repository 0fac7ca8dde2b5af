"""Two result files set side by side: ratios with intervals, and a verdict only where the interval excludes 1.

Times of two runs differ by what the machine did meanwhile too. A ratio to a model timed in the same rounds does not, so
that its change from one file to the other speaks of the model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vitzoo.benchmark.results import Results, Row, passes_of, read_results
from vitzoo.benchmark.statistics import Ratio, change, ratio_of_passes

# what makes two rows the same measurement
MATCHED = (
    "label",
    "model",
    "mode",
    "runtime",
    "precision",
    "layout",
    "attention",
    "device",
    "threads",
    "requested_img_size",
    "requested_batch_size",
    "kwargs",
)
Key = tuple[str, int]


@dataclass(frozen=True)
class Difference:
    """One measurement in both files.

    Attributes:
        row: the row of the first file, without samples.
        before, after: median seconds a call; None where that row has an error.
        ratio: before / after, above 1 where the second file is the faster; None where either row has an error.
        relative: the same of the speed beside the row's baseline, which was timed in the same rounds, by the intervals
            that the rows state; None where either row has none or the files have different ones.
        memory: peak memory of the first over that of the second, None where either has none; it has no interval.
        note: error of either row.
    """

    row: Row
    before: float | None
    after: float | None
    ratio: Ratio | None
    relative: Ratio | None
    memory: float | None
    note: str

    @property
    def verdict(self) -> str:
        """What the second file's model is, `faster` or `slower`, by an interval that excludes 1; empty otherwise."""
        return "" if self.ratio is None else self.ratio.verdict

    @property
    def relative_verdict(self) -> str:
        """The same beside its baseline."""
        return "" if self.relative is None else self.relative.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON takes them."""
        ratios = {"ratio": _plain(self.ratio), "relative": _plain(self.relative)}
        return {
            **asdict(self),
            **ratios,
            "verdict": self.verdict,
            "relative_verdict": self.relative_verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """Two result files side by side.

    Attributes:
        differences: measurements that both have, in the order of the first.
        only_first: labels of rows that the second file lacks; `only_second` likewise.
        machines: field of the machine -> its value in either file, where they differ.
    """

    differences: list[Difference]
    only_first: list[str]
    only_second: list[str]
    machines: Mapping[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON takes them."""
        return {**asdict(self), "differences": [d.to_dict() for d in self.differences]}


def compare_files(
    first: str | os.PathLike[str], second: str | os.PathLike[str], confidence: float = 0.99
) -> Comparison:
    """Compare two result files.

    Args:
        first: the file that is compared with, from before a change, say.
        second: the file that is judged.
        confidence: of the interval of each ratio. Of so many rows with no difference one in 1 / (1 - confidence)
            gets a verdict by chance.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is no result file, or a confidence that makes no sense.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    a, b = read_results(first), read_results(second)
    before, after = _keyed(a.rows), _keyed(b.rows)
    stated = a.header.get("measure", {}).get("confidence"), b.header.get("measure", {}).get("confidence")
    return Comparison(
        [_difference(row, after[key], confidence, stated) for key, row in before.items() if key in after],
        [row["label"] for key, row in before.items() if key not in after],
        [row["label"] for key, row in after.items() if key not in before],
        _machines(a, b),
    )


def _keyed(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return rows by what they measure; of several that measure the same, by their number too."""
    found: dict[Key, Row] = {}
    for row in rows:
        what = json.dumps([row.get(field) for field in MATCHED], sort_keys=True)
        number = 0
        while (what, number) in found:
            number += 1
        found[what, number] = row
    return found


def _plain(ratio: Ratio | None) -> dict[str, float | None] | None:
    if ratio is None:
        return None
    return {k: None if math.isnan(v) else v for k, v in asdict(ratio).items()}


def _difference(
    before: Row, after: Row, confidence: float, stated: tuple[float | None, float | None]
) -> Difference:
    shown = {k: v for k, v in before.items() if k != "samples_s"}
    notes = [
        f"{which}: {row['error']}" for which, row in (("first", before), ("second", after)) if "error" in row
    ]
    peaks = [row.get("peak_mem_mib") for row in (before, after)]
    return Difference(
        shown,
        _median(before),
        _median(after),
        None if notes else ratio_of_passes(passes_of(before), passes_of(after), confidence),
        _relative(before, after, stated),
        peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        "; ".join(notes),
    )


def _relative(before: Row, after: Row, stated: tuple[float | None, float | None]) -> Ratio | None:
    base = before.get("ratio_to")
    confidence = stated[0]
    if base is None or base == before["label"] or base != after.get("ratio_to"):
        return None
    if confidence is None or confidence != stated[1]:
        return None
    return change(_stated(before, confidence), _stated(after, confidence))


def _stated(row: Row, confidence: float) -> Ratio:
    low, high = (math.nan if row[end] is None else row[end] for end in ("ratio_low", "ratio_high"))
    return Ratio(row["ratio"], low, high, confidence)


def _median(row: Row) -> float | None:
    step = row.get(f"{row['mode']}_step_time")
    return None if step is None else step / 1e3


def _machines(a: Results, b: Results) -> dict[str, tuple[Any, Any]]:
    """Return what differs between the machines and may explain a ratio; the load is among it."""
    flat = [_flat(results.header["machine"]) for results in (a, b)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return {
        k: (flat[0].get(k), flat[1].get(k)) for k in keys if flat[0].get(k) != flat[1].get(k) and k != "time"
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        found |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) else {name: inner}
    return found
