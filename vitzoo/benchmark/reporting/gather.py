"""What a report shows: rows of result files, each with its place, its machine and what its authors published."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.models import get_pretrained_cfg, is_model, model_entrypoint

from vitzoo.benchmark.results import Row, read_rows
from vitzoo.registry import family_of


@dataclass(frozen=True)
class Accuracy:
    """A top-1 accuracy on ImageNet-1k as the authors print it.

    Attributes:
        top1: per cent.
        source: where it stands.
    """

    top1: float
    source: str


@dataclass(frozen=True)
class Entry:
    """One row of a result file.

    Attributes:
        number: counts the rows of all files, from 1.
        file: name of the file; `line` is the row's in it, from 1.
        row: the row, without samples.
        machine: what the row ran on, as the report calls it.
        family: the model's family, for the marker.
        published: the accuracy published for what was measured, or why there is none, as a clause.
    """

    number: int
    file: str
    line: int
    row: Row
    machine: str
    family: str
    published: Accuracy | str

    @property
    def place(self) -> str:
        """The file and the line of the row."""
        return f"{self.file}:{self.line}"

    @property
    def side(self) -> float | None:
        """Pixels of the image's side, of the square of the same area where it is oblong; None if unknown."""
        size = self.row.get(f"{self.row['mode']}_img_size", self.row["requested_img_size"])
        return math.sqrt(size[0] * size[1]) if isinstance(size, list) else size

    @property
    def speed(self) -> float:
        """Images a second."""
        return float(self.row[f"{self.row['mode']}_samples_per_sec"])


@dataclass(frozen=True)
class Run:
    """One header: what was run, how, and on what.

    Attributes:
        file: name of the file, and `line` in it.
        header: the row.
        machine: as the report calls its processor.
    """

    file: str
    line: int
    header: Row
    machine: str

    @property
    def busy(self) -> str | None:
        """A sentence if others used the machine when the run began."""
        machine = self.header["machine"]
        load, cores = machine.get("load"), machine["cpu"].get("usable_cores") or machine["cpu"].get("cores")
        if not load or not cores or load[0] <= cores / 2:
            return None
        return (
            f"{self.file}: the machine was busy at the start, load {load[0]:.1f} on {cores} cores; "
            "its times may be too long, ratios within the run are safer"
        )


@dataclass
class Gathered:
    """The content of result files.

    Attributes:
        files: their names, as the report calls them.
        runs: one a header.
        entries: rows that worked.
        failed: rows with an error.
        claims: (place, claim row), of suites.
    """

    files: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    failed: list[Entry] = field(default_factory=list)
    claims: list[tuple[str, Row]] = field(default_factory=list)


def gather(paths: Sequence[str | os.PathLike[str]]) -> Gathered:
    """Read result files.

    Args:
        paths: at least one; a file named twice is read once.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no file; a line that is no row, with its number; or no row at all.
    """
    if not paths:
        raise ValueError("there is no result file to report on")
    found = Gathered()
    several = list({Path(path).resolve(): Path(path) for path in paths}.values())
    found.files = _names(several)
    read = [read_rows(path) for path in several]
    machines = _machine_names(found.files, read)
    for name, rows in zip(found.files, read, strict=True):
        _add(found, name, rows, machines)
    if not found.entries and not found.failed:
        raise ValueError(
            f"no rows in {', '.join(found.files)}: the run ended before its first model was done"
        )
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names, with as many of their folders as tell them apart."""
    for depth in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _add(found: Gathered, name: str, rows: Sequence[tuple[int, Row]], machines: dict[str, str]) -> None:
    header: Row = {}
    for line, row in rows:
        if row["kind"] == "header":
            header = row
            found.runs.append(Run(name, line, row, machines[_identity(row, "cpu")]))
        elif row["kind"] == "claim":
            found.claims.append((f"{name}:{line}", row))
        elif row["kind"] == "result":
            entry = Entry(
                len(found.entries) + len(found.failed) + 1,
                name,
                line,
                {k: v for k, v in row.items() if k != "samples_s"},
                machines[_identity(header, row["device"])],
                family(row["model"]),
                published(row),
            )
            (found.failed if "error" in row else found.entries).append(entry)


def _processor(header: Row, device: str) -> str:
    """Return what ran the rows of a device: the GPU's name, or the processor's with its instruction set."""
    machine = header["machine"]
    kind, _, index = device.partition(":")
    gpus = machine.get("gpus") or []
    if kind == "cuda" and len(gpus) > int(index or 0):
        return str(gpus[int(index or 0)]["name"])
    capability = machine["cpu"].get("torch_capability")
    return machine["cpu"]["model"] + (f" ({capability})" if capability else "")


def _identity(header: Row, device: str) -> str:
    """Return what tells two machines apart: hardware, operating system, versions and commit."""
    machine = header["machine"]
    same = {k: machine.get(k) for k in ("gpus", "platform", "versions", "commit")}
    cores = {k: machine["cpu"].get(k) for k in ("flags", "usable_cores")}
    return json.dumps([_processor(header, device), same, cores], sort_keys=True)


def _machine_names(files: Sequence[str], read: Sequence[Sequence[tuple[int, Row]]]) -> dict[str, str]:
    """Return identity -> name; where two of one name differ otherwise, the file that has it is added."""
    seen: dict[str, dict[str, str]] = {}
    for file, rows in zip(files, read, strict=True):
        header: Row = {}
        for _, row in rows:
            header = row if row["kind"] == "header" else header
            device = row.get("device", "cpu") if row["kind"] == "result" else "cpu"
            seen.setdefault(_processor(header, device), {}).setdefault(_identity(header, device), file)
    return {
        identity: name if len(identities) == 1 else f"{name}, {file}"
        for name, identities in seen.items()
        for identity, file in identities.items()
    }


def family(model: str) -> str:
    """Return the family of a model's name: the registry's, else timm's file, `layer` or `other`."""
    name = model.removeprefix("timm:")
    known = family_of(name)
    if known is not None:
        return known.name
    if name.startswith("layer:"):
        return "layer"
    bare = name.partition(".")[0]
    return model_entrypoint(bare).__module__.rpartition(".")[2] if is_model(bare) else "other"


def published(row: Row) -> Accuracy | str:
    """Return the accuracy that was published for what a row measured, or why there is none."""
    name = row["model"].removeprefix("timm:")
    known = family_of(name)
    if known is None:
        return "no published accuracy in the registry"
    model, _, tag = name.partition(".")
    figures = known.models[model]
    top1 = known.tags[name].top1 if name in known.tags else None if tag else figures.top1
    if top1 is None:
        return "no published accuracy in the registry"
    if row.get("kwargs"):
        return "arguments other than the published model's"
    config = get_pretrained_cfg(name)
    own = config.input_size[1:] if config else None
    size = row["requested_img_size"]
    if size is not None and own not in (None, (size, size) if isinstance(size, int) else tuple(size)):
        return "another image size than the published one"
    if row["precision"] == "int8":
        return "int8, whose accuracy is not the published one"
    return Accuracy(top1, f"{figures.source or known.paper}; {known.code}")
