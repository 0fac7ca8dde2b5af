"""The report's page stands alone, tells all, and fits a telephone; plots are drawn; outputs are never lost."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import vitzoo

pytest.importorskip("plotly", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("jinja2", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("matplotlib", reason="needs the report's packages: pip install 'vitzoo[report]'")
pytest.importorskip("textalloc", reason="needs the report's packages: pip install 'vitzoo[report]'")

NAMES = [
    "throughput_vs_top1",
    "throughput_vs_gmacs",
    "latency_vs_resolution",
    "memory_vs_resolution",
    "float_vs_int8",
]


class Page(HTMLParser):
    """Collects elements, what they refer to, and the text of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [found[k] or "" for k in ("src", "href", "srcset", "data") if k in found]
        self.ids += [found["id"]] if found.get("id") else []


@pytest.fixture(scope="module")
def page(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("report")
    written = vitzoo.benchmark.report(made.rich(folder), folder / "r.html", png=folder / "plots")
    return folder, written


def test_the_page_stands_alone(made: SimpleNamespace, page: tuple[Path, list[Path]]) -> None:
    text = (page[0] / "r.html").read_text()
    found = Page(text)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert {"link", "iframe", "img"}.isdisjoint(found.tags)
    assert "default-src 'none'" in text  # browsers then load nothing from anywhere
    assert set(NAMES) < set(found.ids)
    rows = [i for i in found.ids if i.startswith("row-")]
    assert len(rows) == len(set(rows)) == len(made.zoo) + 4 + 2 * len(made.sweep) + 1 + 9


def test_the_page_tells_claims_errors_machines_and_sources(page: tuple[Path, list[Path]]) -> None:
    text = (page[0] / "r.html").read_text()
    for said in (
        "EViT is faster",
        "1.31 (1.20-1.40)",
        "does not hold here",
        "MemoryError: &lt;b&gt;no&lt;/b&gt; room",
        "the machine was busy at the start, load 3.0 on 2 cores",
        "Faster CPU with a Long Name (AVX2)",
        "torch 2.14.1",
        "Top-1 as published",
        "arXiv 2205.13213, table 1",
        "laptop.jsonl:33",
    ):
        assert said in text
    assert "<b>no</b>" not in text


def test_plots(page: tuple[Path, list[Path]]) -> None:
    from matplotlib.image import imread

    folder, written = page
    assert written == [folder / "r.html", *(folder / "plots" / f"{name}.png" for name in NAMES)]
    assert sorted(p.name for p in (folder / "plots").iterdir()) == sorted(p.name for p in written[1:])
    for path in written[1:]:
        picture = imread(path)
        assert picture.shape[1] == 1350
        assert 0.01 < (picture[..., :3] < 0.95).any(axis=-1).mean() < 0.5  # drawn upon, mostly white


def test_an_existing_output_stays_unless_forced(made: SimpleNamespace, tmp_path: Path) -> None:
    path = made.write(tmp_path / "r.jsonl", made.header(), made.row("litv2_small", 1.0))
    (tmp_path / "r.html").write_text("precious")
    with pytest.raises(FileExistsError, match="--force"):
        vitzoo.benchmark.report(path, tmp_path / "r.html", png=tmp_path / "plots")
    assert (tmp_path / "r.html").read_text() == "precious"
    assert not (tmp_path / "plots").exists()
    vitzoo.benchmark.report(path, tmp_path / "r.html", force=True)
    assert "litv2_small" in (tmp_path / "r.html").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="not a folder for the plots"):
        vitzoo.benchmark.report(path, png=tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        vitzoo.benchmark.report(path, tmp_path / "nowhere" / "r.html")
    with pytest.raises(ValueError, match="name an output"):
        vitzoo.benchmark.report(path)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, FileNotFoundError, "no such result file; `vitzoo bench -o FILE` writes one"),
        ("HEADER", ValueError, "no rows in r.jsonl"),
        ("HEADER\n{broken", ValueError, "line 2: not a row"),
        ("ROW", ValueError, "no header row"),
    ],
    ids=["no file", "no rows", "broken line", "no header"],
)
def test_a_file_that_cannot_be_reported_on(
    made: SimpleNamespace, tmp_path: Path, text: str | None, kind: type[Exception], message: str
) -> None:
    if text is not None:
        text = text.replace("HEADER", json.dumps(made.header())).replace(
            "ROW", json.dumps(made.row("litv2_small", 1.0))
        )
        (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(kind, match=message):
        vitzoo.benchmark.report(tmp_path / "r.jsonl", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("module", ["plotly", "jinja2", "matplotlib", "textalloc"])
def test_missing_package(
    made: SimpleNamespace, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else find(n, *a))
    path = made.write(tmp_path / "r.jsonl", made.header(), made.row("litv2_small", 1.0))
    with pytest.raises(ImportError, match=rf"the report needs {module}.*pip install 'vitzoo\[report\]'"):
        vitzoo.benchmark.report(path, tmp_path / "r.html", png=tmp_path / "plots")
    assert not (tmp_path / "r.html").exists()


PROBE = """<script>setTimeout(() => {
  const boxes = [...document.querySelectorAll(".chart .text text")].filter((t) => t.style.visibility !== "hidden")
    .map((t) => [t.closest(".chart").id, t.getBoundingClientRect()]);
  let overlaps = 0;
  boxes.forEach(([chart, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (chart === other && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
      overlaps += 1;
  }));
  const drawn = [...document.querySelectorAll(".chart .main-svg:first-child")].map((c) => c.getBoundingClientRect());
  const found = { width: innerWidth, content: document.documentElement.scrollWidth, charts: drawn.length,
    widest: Math.max(...drawn.map((box) => box.right)), labels: boxes.length, overlaps };
  const chart = document.getElementById("throughput_vs_gmacs");
  const key = [...chart.querySelectorAll(".legend .traces")].find((one) => one.textContent === "litv2");
  for (const kind of ["mousedown", "mouseup"])
    key.querySelector(".legendtoggle").dispatchEvent(new MouseEvent(kind, { bubbles: true, button: 0 }));
  chart.emit("plotly_click", { points: [{ customdata: 3 }] });
  setTimeout(() => {
    found.hidden = chart.data.filter((trace) => trace.visible === "legendonly").map((trace) => trace.meta.join("/"));
    found.opened = [...document.querySelectorAll("details[open]")].map((row) => row.id);
    console.log("PROBE " + JSON.stringify(found));
  }, 1500);
}, 2000)</script></body>"""


@pytest.mark.slow
def test_the_page_in_a_browser(page: tuple[Path, list[Path]], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    (tmp_path / "r.html").write_text((page[0] / "r.html").read_text().replace("</body>", PROBE))
    # a window has a least width of 500 pixels, a frame has none
    frames = "".join(
        f'<iframe src="r.html" style="width:{w}px;height:4000px;border:0"></iframe>' for w in (1280, 400)
    )
    (tmp_path / "frames.html").write_text(f'<body style="margin:0">{frames}</body>')
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",  # their width is not the page's
        "--enable-logging=stderr",
        "--window-size=1700,4000",
    ]
    options += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=240
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in said if "PROBE" not in line] == []
    found = {}
    for line in said:
        measured, _ = json.JSONDecoder().raw_decode(line[line.index("PROBE ") + 6 :])
        found[measured["width"]] = measured
    assert set(found) == {1280, 400}
    for width, measured in found.items():
        assert measured["content"] == width  # nothing to scroll to on the right
        assert measured["widest"] <= width
        assert measured["charts"] == len(NAMES)
        assert measured["labels"] > 20
        assert measured["overlaps"] == 0
        # one entry of the legend hides that family in every setting; a click on a point opens its row
        settings = (
            "Some CPU (AVX2), float32",
            "Some CPU (AVX2), int8",
            "Faster CPU with a Long Name (AVX2), float32",
        )
        assert measured["hidden"] == [*(f"{setting}/litv2" for setting in settings), "litv2"]
        assert measured["opened"] == ["row-3"]
