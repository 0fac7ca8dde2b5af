"""Suites: TOML files of comparisons to measure and claims to judge, read into frozen dataclasses."""

from __future__ import annotations

import functools
import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vitzoo.benchmark.case import Case, Measure, sweep
from vitzoo.benchmark.claims import Claim, judged
from vitzoo.benchmark.results import Results
from vitzoo.benchmark.run import Group, run_groups
from vitzoo.benchmark.timing import Progress


@dataclass(frozen=True)
class Entry:
    """One model of a comparison; fields as in `Case`, for this model alone.

    Attributes:
        label: how claims and rows call it.
        model: a name, as `Case` takes it.
        runtime: of this entry.
        attention: "matrix" to form the attention matrix.
        img_size: of this entry; the comparison's if None.
        kwargs: constructor arguments.
    """

    label: str
    model: str
    runtime: str = "eager"
    attention: str = "default"
    img_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Models timed side by side in one setting, or in one for each image size.

    Attributes:
        name: of the comparison.
        entry: its models; ratios in the rows are to the last.
        claim: what is said of them.
        batch_size: images a call.
        img_size: sizes to sweep over; each model's own if empty.
        quick_img_size: the same for the quick form; `img_size` if empty.
        threads: CPU threads; PyTorch's number if None.
        dtype: of weights and input.
        device: where it runs.
        memory: measure peak memory here even where the suite does not.
    """

    name: str
    entry: tuple[Entry, ...]
    claim: tuple[Claim, ...] = ()
    batch_size: int = 1
    img_size: tuple[int, ...] = ()
    quick_img_size: tuple[int, ...] = ()
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    memory: bool = False

    def __post_init__(self) -> None:
        labels = [entry.label for entry in self.entry]
        if len(set(labels)) < len(labels):
            raise ValueError(f"comparison {self.name!r}: labels {labels} are not all different")
        for claim in self.claim:
            for label in (claim.subject, claim.baseline):
                if label not in labels:
                    raise ValueError(f"comparison {self.name!r}: claim about {label!r}, not one of {labels}")

    def groups(self, quick: bool) -> list[list[Case]]:
        """Return the cases, a group for each image size of the whole or of the quick form."""
        sizes = (quick and self.quick_img_size) or self.img_size or (None,)
        subjects = [
            Case(e.model, e.label, runtime=e.runtime, attention=e.attention, kwargs=e.kwargs)
            for e in self.entry
        ]
        groups = sweep(
            subjects,
            img_size=list(sizes),
            batch_size=self.batch_size,
            threads=self.threads,
            dtype=self.dtype,
            device=self.device,
        )
        own = [entry.img_size for entry in self.entry]
        return [
            [replace(c, img_size=s or c.img_size) for c, s in zip(group, own, strict=True)]
            for group in groups
        ]


@dataclass(frozen=True)
class Suite:
    """A TOML file of `configs/benchmark`.

    Attributes:
        title: what it is.
        comparison: measured one after another.
        measure: how.
        quick: how, in the quick form.
    """

    title: str
    comparison: tuple[Comparison, ...]
    measure: Measure = field(default_factory=Measure)
    quick: Measure = field(default_factory=Measure)


def suite_path(name: str | os.PathLike[str]) -> Path:
    """Return the file of a suite: one of ours by its name, or a path.

    Raises:
        FileNotFoundError: neither; the message lists ours.
    """
    folder = Path(str(files("vitzoo.benchmark").joinpath("suites")))
    ours = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    path = ours.get(os.fspath(name), Path(name))
    if not path.is_file():
        raise FileNotFoundError(2, f"neither a suite of ours ({', '.join(ours)}) nor a file", os.fspath(name))
    return path


def load_suite(name: str | os.PathLike[str]) -> Suite:
    """Read a suite by its name or path.

    Raises:
        FileNotFoundError: there is none.
        ValueError: TOML that cannot be read, an unknown or missing key, or a value that makes no sense; the message
            says where.
    """
    path = suite_path(name)
    try:
        return parse(tomllib.loads(path.read_text(encoding="utf-8")), Suite, "the suite")
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse(data: Any, kind: Any, where: str) -> Any:
    """Return a dataclass of a table, and of the tables in it.

    Raises:
        ValueError: unknown or missing keys, or values of another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {data!r}, expected a table")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"unknown key {', '.join(unknown)} in {where}; known: {', '.join(known)}")
    missing = [
        n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(name, value, hints[name], where) for name, value in data.items()})


def _value(name: str, value: Any, hint: Any, where: str) -> Any:
    several = get_origin(hint) is tuple
    kind = get_args(hint)[0] if several else hint
    if not is_dataclass(kind):
        if not _fits(value, hint):
            raise ValueError(
                f"{name} = {value!r} in {where} is not of type {getattr(hint, '__name__', hint)}"
            )
        return tuple(value) if several else value
    if not several:
        return parse(value, kind, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} in {where} is {value!r}, expected a list of tables: [[{name}]]")
    return tuple(parse(v, kind, f"{name} {_title(v, number)}") for number, v in enumerate(value, 1))


def _title(table: Any, number: int) -> str:
    name = table.get("name", table.get("label")) if isinstance(table, Mapping) else None
    return repr(name) if name else f"number {number}"


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    return type(value) in ((int, float) if hint is float else (hint,))


def run_suite(
    name: str | os.PathLike[str],
    quick: bool = False,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Measure a suite and judge its claims.

    Args:
        name: one of ours, or the path of a TOML file.
        quick: take its quick form.
        output: JSON Lines file to write row by row.
        force: replace the output if it exists.
        progress: told the present step and the share of the whole that is done.

    Returns:
        Header, rows and claims.

    Raises:
        FileNotFoundError, ValueError: as `load_suite`, before anything is measured.
        OSError: an output that exists or cannot be written.
    """
    suite = load_suite(name)
    measure = suite.quick if quick else suite.measure
    groups = []
    for comparison in suite.comparison:
        how = replace(measure, memory=measure.memory or comparison.memory)
        for cases in comparison.groups(quick):
            judge = functools.partial(judged, comparison.name, comparison.claim)
            groups.append(Group(cases, len(cases) - 1, how, comparison.name, judge))
    return run_groups(groups, measure, output, force, progress, suite=suite.title, quick=quick)
