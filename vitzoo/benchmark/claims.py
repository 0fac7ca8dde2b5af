"""Claims about speed and memory, judged by what was measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitzoo.benchmark.results import SCHEMA_VERSION, Row, passes_of
from vitzoo.benchmark.statistics import Ratio, ratio_of_passes

FIGURES = ("speed", "memory")
HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "not measured"


@dataclass(frozen=True)
class Claim:
    """What somebody says of two entries.

    Attributes:
        text: the claim in words.
        source: who says it, and where.
        subject: label of the entry it speaks of.
        baseline: label of the entry it is compared with.
        expected: how many times faster, or smaller in memory, the subject is said to be. 1 is "as good as".
        figure: "speed" or "memory".
        img_size: the size it is about; every size if None.
        tolerance: the claim holds down to this share of `expected`.
    """

    text: str
    source: str
    subject: str
    baseline: str
    expected: float
    figure: str = "speed"
    img_size: int | None = None
    tolerance: float = 0.9

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise ValueError(f"unknown figure {self.figure!r}; known: {', '.join(FIGURES)}")
        if self.expected <= 0 or not 0 < self.tolerance <= 1:
            raise ValueError(
                f"expected {self.expected} or tolerance {self.tolerance} is out of range: {self.text}"
            )


def judged(comparison: str, claims: Sequence[Claim], rows: Sequence[Row], confidence: float) -> list[Row]:
    """Judge the claims that are about rows measured side by side.

    Args:
        comparison: its name.
        claims: all that are made of the comparison; those about another image size are left out.
        rows: one an entry, of one image size.
        confidence: of the interval.

    Returns:
        One row a claim: the claim, what was measured, on what, and the verdict. The claim holds if the measured ratio
        reaches `tolerance` of the expected one.
    """
    by_label = {row["label"]: row for row in rows}
    found = []
    for claim in claims:
        subject, baseline = by_label[claim.subject], by_label[claim.baseline]
        if claim.img_size in (None, subject["requested_img_size"]):
            found.append(_judged(comparison, claim, subject, baseline, confidence))
    return found


def in_words(claim: Row) -> str:
    """Return the verdict of a claim's row, and that noise could turn it where its bar lies in the interval."""
    needed = claim["tolerance"] * claim["expected"]
    if claim["low"] is not None and claim["low"] <= needed <= claim["high"]:
        return f"{claim['verdict']}, within noise"
    return str(claim["verdict"])


def _judged(comparison: str, claim: Claim, subject: Row, baseline: Row, confidence: float) -> Row:
    row: dict[str, Any] = {"kind": "claim", "schema_version": SCHEMA_VERSION, "comparison": comparison}
    row |= asdict(claim) | {"figure": claim.figure, "img_size": subject["requested_img_size"]}
    row |= {k: subject[k] for k in ("threads", "precision", "device", "requested_batch_size")}
    row |= {"runtimes": [subject["runtime"], baseline["runtime"]]}
    errors = [f"{r['label']}: {r['error']}" for r in (subject, baseline) if "error" in r]
    ratio = None if errors else _ratio(claim, subject, baseline, confidence)
    if ratio is None:
        row |= {"measured": None, "low": None, "high": None, "verdict": UNKNOWN}
        return row | {"reason": "; ".join(errors) or "peak memory is not known"}
    ends = [None if math.isnan(end) else float(f"{end:.6g}") for end in (ratio.low, ratio.high)]
    verdict = HOLDS if ratio.value >= claim.tolerance * claim.expected else FAILS
    return row | {
        "measured": float(f"{ratio.value:.6g}"),
        "low": ends[0],
        "high": ends[1],
        "verdict": verdict,
    }


def _ratio(claim: Claim, subject: Row, baseline: Row, confidence: float) -> Ratio | None:
    if claim.figure == "speed":
        return ratio_of_passes(passes_of(baseline), passes_of(subject), confidence, paired=True)
    peaks = subject.get("peak_mem_mib"), baseline.get("peak_mem_mib")
    if not peaks[0] or not peaks[1]:
        return None
    return Ratio(peaks[1] / peaks[0], math.nan, math.nan, confidence)
