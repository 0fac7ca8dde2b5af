"""The charts of a report. A point stands for one row; what is left out of a chart is said in its sentences."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vitzoo.benchmark.compare import MATCHED
from vitzoo.benchmark.reporting.chart import Arrow, Axis, Chart, Front, Group, Mark
from vitzoo.benchmark.reporting.crossings import crossings
from vitzoo.benchmark.reporting.gather import Accuracy, Entry
from vitzoo.benchmark.view import SETTINGS, UNREMARKABLE, plain, said


def charts(entries: Sequence[Entry]) -> list[Chart]:
    """Return all charts, those with nothing to draw too."""
    inferred = [entry for entry in entries if entry.row["mode"] == "infer"]
    return [
        throughput_vs_top1(inferred),
        throughput_vs_gmacs(inferred),
        latency_vs_resolution(inferred),
        memory_vs_resolution(inferred),
        float_vs_int8(inferred),
    ]


def throughput_vs_top1(entries: Sequence[Entry]) -> Chart:
    """Return throughput measured here against accuracy as published."""
    name, title = "throughput_vs_top1", "Throughput and published accuracy"
    shown, left_out = [], Counter[str]()
    for entry in entries:
        if isinstance(entry.published, Accuracy):
            shown.append(entry)
        else:
            left_out[entry.published] += 1
    if not shown:
        reasons = "; ".join(left_out) or "there is no row of inference that worked"
        return Chart(
            name, title, empty=f"No row has a published accuracy to set beside its speed: {reasons}."
        )
    says = ["Throughput was measured here; top-1 is the authors' figure on ImageNet-1k, not measured here."]
    says += [_fronts_say("none of its setting is both faster and more accurate")]
    if left_out:
        parts = "; ".join(f"{count} with {reason}" for reason, count in left_out.items())
        says.append(f"Not shown, of {len(entries)} rows: {parts}.")

    def place(entry: Entry) -> tuple[float, float]:
        assert isinstance(entry.published, Accuracy), "rows without one were left out"
        return entry.speed, entry.published.top1

    axes = Axis("images/s, measured here"), Axis("top-1 on ImageNet-1k as published, %", log=False)
    return _scatter(Chart(name, title, says, *axes), shown, place, lambda entry: entry.row["label"])


def throughput_vs_gmacs(entries: Sequence[Entry]) -> Chart:
    """Return throughput against multiply-accumulates of one image."""
    name, title = "throughput_vs_gmacs", "Throughput and multiply-accumulates"
    shown = [entry for entry in entries if entry.row.get("infer_gmacs")]
    if not shown:
        return Chart(name, title, empty="No row of inference has its multiply-accumulates counted.")
    says = ["GMACs are counted, of one image at the size it was measured at; 1 MAC is 2 FLOPs."]
    says += [_fronts_say("none of its setting does both more images and more work for each")]
    if len(shown) < len(entries):
        says.append(
            f"Not shown, of {len(entries)} rows: {len(entries) - len(shown)} whose GMACs are unknown."
        )

    def place(entry: Entry) -> tuple[float, float]:
        return float(entry.row["infer_gmacs"]), entry.speed

    axes = Axis("GMACs an image"), Axis("images/s")
    return _scatter(Chart(name, title, says, *axes), shown, place, _label_with_size)


def _fronts_say(condition: str) -> str:
    return f"The dotted line is the Pareto front: of a model on it, {condition}."


def _label_with_size(entry: Entry) -> str:
    asked = entry.row["requested_img_size"]
    return entry.row["label"] if asked is None else f"{entry.row['label']} at {plain(entry.row)['img_size']}"


def _scatter(
    chart: Chart,
    entries: Sequence[Entry],
    place: Callable[[Entry], tuple[float, float]],
    label: Callable[[Entry], str],
) -> Chart:
    """Return the chart with one marker a family, one colour a setting and machine, and a front of each setting."""
    common, setting_of = _settings(entries, without=("img_size",))
    marks = [Mark(*place(entry), label(entry), entry) for entry in entries]
    setting = {entry.number: setting_of(entry) for entry in entries}
    settings = list(dict.fromkeys(setting.values()))
    families = {name: number for number, name in enumerate(dict.fromkeys(e.family for e in entries))}
    groups, fronts = [], []
    several = len(settings) > 1
    for colour, one in enumerate(settings):
        alike = [mark for mark in marks if setting[mark.entry.number] == one]
        for name, shape in families.items():
            chosen = [mark for mark in alike if mark.entry.family == name]
            if chosen:
                groups.append(Group(one if several else name, chosen, colour if several else shape, shape))
        front = pareto(alike)
        if len(front) > 1:
            fronts.append(Front(one if several else "Pareto front", front, colour if several else None))
    says = [*chart.says, *([f"All of them: {common}."] if common else [])]
    shapes = families if several else {}
    return Chart(chart.name, chart.title, says, chart.x, chart.y, groups, shapes, fronts)


def pareto(marks: Iterable[Mark]) -> list[Mark]:
    """Return the marks that no other is at least equal to on both axes and above on one, from left to right."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, m.y), reverse=True):
        if not best or mark.y > best[-1].y:
            best.append(mark)
    return best[::-1]


def _settings(entries: Sequence[Entry], without: tuple[str, ...] = ()) -> tuple[str, Callable[[Entry], str]]:
    """Return in words what all entries have in common, and a function that says what one of them has besides."""
    every = [plain(entry.row) for entry in entries]
    names = [name for name in SETTINGS if name not in (*without, "mode")]
    varying = [name for name in names if len({str(row[name]) for row in every}) > 1]
    machines = len({entry.machine for entry in entries}) > 1
    fixed = [said(n, every[0][n]) for n in names if n not in varying and every[0][n] != UNREMARKABLE.get(n)]

    def of(entry: Entry) -> str:
        row = plain(entry.row)
        words = [said(name, row[name]) for name in varying]
        return ", ".join([*([entry.machine] if machines else []), *words]) or "all"

    return ", ".join([*fixed, *([] if machines else [entries[0].machine])]), of


def latency_vs_resolution(entries: Sequence[Entry]) -> Chart:
    """Return median latency against the side of the image, with where the lines cross."""
    chart = Chart("latency_vs_resolution", "Latency and resolution", y=Axis("ms a call, median (p50)"))
    return _over_resolution(chart, entries, lambda entry: entry.row.get("p50_ms"), "latency", "faster")


def memory_vs_resolution(entries: Sequence[Entry]) -> Chart:
    """Return peak memory against the side of the image, with where the lines cross."""
    chart = Chart("memory_vs_resolution", "Peak memory and resolution", y=Axis("peak memory, MiB"))
    return _over_resolution(
        chart, entries, lambda entry: entry.row.get("peak_mem_mib"), "peak memory", "smaller"
    )


def _over_resolution(
    chart: Chart, entries: Sequence[Entry], value: Callable[[Entry], float | None], what: str, better: str
) -> Chart:
    """Return the chart with a line for each model and setting that has more than one size."""
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        if value(entry) and entry.side:
            lines.setdefault(_identity(entry, without=("requested_img_size",)), []).append(entry)
    sweeps = [line for line in lines.values() if len({entry.side for entry in line}) > 1]
    if not sweeps:
        return Chart(
            chart.name,
            chart.title,
            empty=f"No model has its {what} measured at more than one image size in one setting: "
            "vitzoo bench --img-size 224,512,1024 gives such rows.",
        )
    common, setting_of = _settings([entry for line in sweeps for entry in line], without=("img_size",))
    labels = list(dict.fromkeys(line[0].row["label"] for line in sweeps))
    settings = list(dict.fromkeys(setting_of(line[0]) for line in sweeps))
    groups = []
    for line in sweeps:
        label, setting = line[0].row["label"], setting_of(line[0])
        key = label if len(settings) == 1 else f"{label}, {setting}"
        points = [Mark(float(e.side or 0), float(value(e) or 0), key, e) for e in line]
        shape = settings.index(setting)
        marks = sorted(points, key=lambda m: m.x)
        groups.append(Group(key, marks, labels.index(label), shape, joined=True, dashed=shape > 0))
    says = [f"All of them: {common}."] if common else []
    for setting in settings:
        of_setting = [g for g in groups if setting_of(g.marks[0].entry) == setting]
        for a, b in itertools.combinations(of_setting, 2):
            where = [[(m.x, m.y) for m in group.marks] for group in (a, b)]
            for low, high, first in crossings(*where):
                names = (a.key, b.key) if first else (b.key, a.key)
                says.append(f"{names[0]} gets {better} than {names[1]} between {low:g} and {high:g} pixels.")
    x = Axis("side of the image, pixels")
    return Chart(chart.name, chart.title, says, x, chart.y, groups)


def float_vs_int8(entries: Sequence[Entry]) -> Chart:
    """Return an arrow from the throughput of each model in floating point to that in int8."""
    name, title = "float_vs_int8", "Floating point and int8"
    same = functools.partial(_identity, without=("precision", "label"))
    floats = {same(entry): entry for entry in reversed(entries) if entry.row["precision"] != "int8"}
    floats |= {same(entry): entry for entry in reversed(entries) if entry.row["precision"] == "float32"}
    quantized = [entry for entry in entries if entry.row["precision"] == "int8"]
    pairs = [(floats[same(entry)], entry) for entry in quantized if same(entry) in floats]
    if not pairs:
        why = (
            "no row is int8" if not quantized else "no int8 row has one of the same setting in floating point"
        )
        return Chart(name, title, empty=f"There is nothing to draw an arrow between: {why}.")
    common, setting_of = _settings([entry for _, entry in pairs], without=("precision",))
    names, arrows = [], []
    for place, (before, after) in enumerate(pairs):
        words = [after.row["label"]] + ([setting_of(after)] if setting_of(after) != "all" else [])
        names.append(", ".join(words))
        start, end = (Mark(entry.speed, float(place), names[-1], entry) for entry in (before, after))
        arrows.append(Arrow(start, end, f"{after.speed / before.speed:.2f}x"))
    says = ["An arrow leads from a model's speed in floating point to that in int8; the factor is beside it."]
    says += ["Accuracy is not shown: int8 may lose some."]
    says += [f"All of them: {common}."] if common else []
    if len(pairs) < len(quantized):
        says.append(f"Not shown: {len(quantized) - len(pairs)} int8 rows with no such row in floating point.")
    groups = [
        Group("floating point", [arrow.start for arrow in arrows], None, 0),
        Group("int8", [arrow.end for arrow in arrows], 0, 2),
    ]
    axis = Axis("images/s")
    return Chart(name, title, says, axis, Axis("", log=False), groups, arrows=arrows, names=names)


def _identity(entry: Entry, without: tuple[str, ...]) -> str:
    """Return what makes a row the same measurement as another, some settings apart."""
    fields = [entry.row.get(name) for name in MATCHED if name not in without]
    return json.dumps([entry.machine, *fields], sort_keys=True, default=str)
