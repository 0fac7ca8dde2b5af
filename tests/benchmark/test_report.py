"""Reports: each point is its row; fronts, crossings and accuracies are right; what is left out is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import vitzoo

pytest.importorskip("plotly", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("jinja2", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("matplotlib", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("textalloc", reason="needs the report's packages: pip install 'vitzoo[report]'")

from vitzoo.benchmark.reporting.chart import Chart, Mark
from vitzoo.benchmark.reporting.charts import charts, pareto
from vitzoo.benchmark.reporting.crossings import crossings
from vitzoo.benchmark.reporting.gather import Accuracy, family, gather, published
from vitzoo.benchmark.reporting.interactive import figure, hover
from vitzoo.benchmark.reporting.style import ticks

NAMES = [
    "throughput_vs_top1",
    "throughput_vs_gmacs",
    "latency_vs_resolution",
    "memory_vs_resolution",
    "float_vs_int8",
]


def _charts(*paths: Path) -> dict[str, Chart]:
    found = {chart.name: chart for chart in charts(gather(paths).entries)}
    assert list(found) == NAMES
    return found


def _marks(chart: Chart) -> list[Mark]:
    return [mark for group in chart.groups for mark in group.marks]


def test_every_point_leads_to_its_row(made: SimpleNamespace, tmp_path: Path) -> None:
    paths = made.rich(tmp_path)
    lines = {path.name: path.read_text().splitlines() for path in paths}
    for chart in _charts(*paths).values():
        assert chart.empty == ""
        assert _marks(chart)
        for mark in _marks(chart):
            row = json.loads(lines[mark.entry.file][mark.entry.line - 1])
            row.pop("samples_s")
            assert row == mark.entry.row
    top1 = _marks(_charts(*paths)["throughput_vs_top1"])
    assert {(m.entry.row["model"], m.y) for m in top1} >= {
        ("litv2_small", 82.0),
        ("deit_tiny_patch16_224", 72.2),
    }
    assert all(mark.x == mark.entry.row["infer_samples_per_sec"] for mark in top1)
    gmacs = _marks(_charts(*paths)["throughput_vs_gmacs"])
    assert {"litv2_small", "Vim-Ti at 512"} < {mark.label for mark in gmacs}
    assert all(
        m.x == m.entry.row["infer_gmacs"] and m.y == m.entry.row["infer_samples_per_sec"] for m in gmacs
    )


def test_a_front_holds_what_nothing_beats() -> None:
    places = [(1, 5), (2, 4), (2, 3), (3, 4), (4, 1), (0.5, 5), (3.5, 1)]
    front = pareto([Mark(x, y, "", None) for x, y in places])
    assert [(mark.x, mark.y) for mark in front] == [(1, 5), (3, 4), (4, 1)]


def test_fronts_do_not_mix_settings(made: SimpleNamespace, tmp_path: Path) -> None:
    chart = _charts(*made.rich(tmp_path))["throughput_vs_gmacs"]
    assert len(chart.fronts) == 3  # float32 and int8 on the one machine, float32 on the other
    for front in chart.fronts:
        assert len({(m.entry.machine, m.entry.row["precision"]) for m in front.marks}) == 1
    assert {g.key for g in chart.groups} == {f.key for f in chart.fronts}
    assert len(chart.shapes) == len({m.entry.family for m in _marks(chart)})


def test_one_setting_has_a_colour_and_a_marker_a_family(made: SimpleNamespace, tmp_path: Path) -> None:
    path = made.write(
        tmp_path / "r.jsonl",
        made.header(),
        *(made.row(n, s, infer_gmacs=g) for n, (s, g) in made.zoo.items()),
    )
    chart = _charts(path)["throughput_vs_gmacs"]
    assert [(g.key, g.colour, g.shape) for g in chart.groups][:3] == [
        ("litv2", 0, 0),
        ("evit", 1, 1),
        ("deit", 2, 2),
    ]
    assert len({(g.colour, g.shape) for g in chart.groups}) == len(chart.groups)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([(1, 1), (2, 4), (3, 9)], [(1, 2), (2, 3), (3, 4)], [(1, 2, False)]),
        ([(1, 3), (2, 1)], [(1, 2), (2, 2)], [(1, 2, True)]),
        ([(1, 1), (2, 1)], [(1, 2), (2, 2)], []),
        ([(1, 1), (2, 2), (3, 3)], [(1, 2), (2, 2), (3, 2)], [(1, 3, False)]),
        ([(1, 1), (2, 1)], [(3, 0)], []),
    ],
    ids=["once", "the other way", "never", "through a tie", "nothing in common"],
)
def test_crossings(a: list, b: list, expected: list) -> None:
    assert crossings(a, b) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 900, [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]),
        (3, 4.6, [3, 3.5, 4, 4.5]),
        (4, 11, [4, 5, 6, 7, 8, 9, 10]),
        (22.1, 22.9, []),
        (1e-3, 1e4, [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000]),
    ],
)
def test_an_axis_has_a_few_ticks(low: float, high: float, expected: list) -> None:
    found = ticks([low, high])
    assert [tick for tick in found if low <= tick <= high] == pytest.approx(expected)
    assert found[0] < low < high < found[-1]


def test_the_crossover_is_told(made: SimpleNamespace, tmp_path: Path) -> None:
    found = _charts(*made.rich(tmp_path))
    assert (
        "Vim-Ti gets faster than DeiT-Ti between 512 and 768 pixels." in found["latency_vs_resolution"].says
    )
    assert (
        "Vim-Ti gets smaller than DeiT-Ti between 224 and 512 pixels." in found["memory_vs_resolution"].says
    )
    lines = {group.key: [(m.x, m.y) for m in group.marks] for group in found["latency_vs_resolution"].groups}
    assert lines == {
        "Vim-Ti": [(size, 1e3 / scan) for size, (scan, _) in made.sweep.items()],
        "DeiT-Ti": [(size, 1e3 / vit) for size, (_, vit) in made.sweep.items()],
    }


def test_int8_stands_beside_its_own_float_row(made: SimpleNamespace, tmp_path: Path) -> None:
    rows = [
        made.row("litv2_small", 10.0, precision=p, infer_samples_per_sec=s)
        for p, s in (("bfloat16", 12.0), ("int8", 20.0))
    ]
    other = made.row("litv2_small", 99.0, threads=1)
    arrows = _charts(made.write(tmp_path / "a.jsonl", made.header(), other, *rows))["float_vs_int8"].arrows
    assert [(a.start.x, a.end.x, a.text) for a in arrows] == [(12.0, 20.0, "1.67x")]
    rows.append(made.row("litv2_small", 10.0))
    arrows = _charts(made.write(tmp_path / "b.jsonl", made.header(), other, *rows))["float_vs_int8"].arrows
    assert [(a.start.x, a.end.x, a.text) for a in arrows] == [(10.0, 20.0, "2.00x")]


def test_what_is_left_out_is_told(made: SimpleNamespace, tmp_path: Path) -> None:
    path = made.write(tmp_path / "r.jsonl", made.header(), made.row("layer:hilo", 5.0, infer_gmacs=None))
    found = _charts(path)
    assert "no published accuracy in the registry" in found["throughput_vs_top1"].empty
    assert "counted" in found["throughput_vs_gmacs"].empty
    assert "--img-size" in found["latency_vs_resolution"].empty
    assert "no row is int8" in found["float_vs_int8"].empty
    vitzoo.benchmark.report(path, tmp_path / "r.html", png=tmp_path / "plots")
    assert list((tmp_path / "plots").iterdir()) == []
    text = (tmp_path / "r.html").read_text()
    assert all(chart.empty.split(":")[0] in text for chart in found.values())


@pytest.mark.parametrize(
    ("model", "more", "expected"),
    [
        ("litv2_small", {}, 82.0),
        ("timm:deit_small_patch16_224", {}, 79.9),
        ("evit_small_patch16_224.keep0.5_fuse_in1k", {}, 78.5),
        ("cvt_13_384", {"size": 384}, 83.3),
        ("evit_small_patch16_224.deit_in1k", {}, "no published accuracy"),
        ("litv2_small", {"size": 512}, "another image size"),
        ("litv2_small", {"kwargs": {"alpha": 0.5}}, "arguments other"),
        ("litv2_small", {"precision": "int8"}, "int8"),
        ("resnet18", {}, "no published accuracy"),
    ],
    ids=["model", "timm's", "tag", "own size", "weights not tuned", "size", "arguments", "int8", "unlisted"],
)
def test_an_accuracy_is_that_of_what_was_measured(
    made: SimpleNamespace, model: str, more: dict, expected: float | str
) -> None:
    found = published(made.row(model, 1.0, **more))
    if isinstance(expected, str):
        assert found.startswith(expected)
    else:
        assert isinstance(found, Accuracy)
        assert found.top1 == expected
        assert "https://" in found.source


def test_families() -> None:
    names = ["vim_tiny_patch16_224", "timm:resnet18", "layer:hilo", "mine.onnx", "Net"]
    assert [family(name) for name in names] == ["vim", "resnet", "layer", "other", "other"]


def test_machines_of_one_name_are_told_apart(made: SimpleNamespace, tmp_path: Path) -> None:
    a = made.write(tmp_path / "a.jsonl", made.header(), made.row("litv2_small", 1.0))
    b = made.write(tmp_path / "b.jsonl", made.header(commit="def"), made.row("litv2_small", 2.0))
    c = made.write(tmp_path / "c.jsonl", made.header(load=[1, 1, 1]), made.row("litv2_small", 3.0))
    assert [e.machine for e in gather([a, c]).entries] == ["Some CPU (AVX2)"] * 2
    names = [e.machine for e in gather([a, b, c]).entries]
    assert names == ["Some CPU (AVX2), a.jsonl", "Some CPU (AVX2), b.jsonl", "Some CPU (AVX2), a.jsonl"]
    gpu = made.header(gpus=[{"name": "Some GPU"}])
    rows = [made.row("litv2_small", 1.0), made.row("litv2_small", 9.0, device="cuda")]
    found = gather([made.write(tmp_path / "d.jsonl", gpu, *rows)])
    assert [e.machine for e in found.entries] == ["Some CPU (AVX2)", "Some GPU"]
    assert [e.place for e in found.entries] == ["d.jsonl:2", "d.jsonl:3"]


def test_files_of_one_name_are_told_apart(made: SimpleNamespace, tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(made.write(tmp_path / folder / "r.jsonl", made.header(), made.row("litv2_small", 1.0)))
    assert gather([*paths, paths[0]]).files == ["x/r.jsonl", "y/r.jsonl"]


def test_the_pointer_shows_the_row(made: SimpleNamespace, tmp_path: Path) -> None:
    path = made.write(tmp_path / "r.jsonl", made.header(), made.row("litv2_small", 8.0, "<b>LIT</b>"))
    (entry,) = gather([path]).entries
    shown = hover(entry)
    for said in (
        "&lt;b&gt;LIT",
        "litv2_small",
        "images/s 8",
        "p50 ms 125",
        "peak MiB 150",
        "scan: cpu",
        "top-1 82.0",
    ):
        assert said in shown
    assert "row: r.jsonl:2" in shown
    assert max(map(len, shown.split("<br>"))) < 60
    trace = next(t for t in figure(_charts(path)["throughput_vs_top1"]).data if t.customdata)
    assert list(trace.customdata) == [entry.number]
    assert list(trace.hovertext) == [shown]
