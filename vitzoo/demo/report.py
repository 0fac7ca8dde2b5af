"""What the demo shows in the terminal: a progress bar, then a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def tracked(console: Any) -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar; the function it gives is told the present step and the share of the whole done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=28), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=console.is_terminal
    ) as bar:
        task = bar.add_task("start", total=1.0)

        def tell(step: str, done: float) -> None:
            bar.update(task, description=step, completed=done)

        yield tell


def print_summary(console: Any, result: dict[str, Any], out: Path) -> None:
    """Print the table, what must be known to read it, and where the files are."""
    from rich.markup import escape

    from vitzoo.demo import UNTRAINED

    cpu = result["machine"]["cpu"]
    console.print(_table(result))
    quantized = [row for row in result["models"] if "int8" in row]
    if quantized:
        console.print(_int8_table(quantized))
        for row in quantized:
            if row["int8"]["refused"]:
                text = f"{row['model']}: no INT8 file: {row['int8']['refused']}"
                console.print(escape(text), style="yellow", highlight=False)
    console.print(
        f"{cpu['model']}, {cpu['torch_capability']}, {cpu['threads']} threads; latency at batch 1, images/s "
        f"at batch {result['throughput_batch']}; ONNX difference: norm(onnx - eager) / norm(eager) on "
        f"{' and '.join(result['photographs'])}; 1 MAC = 2 FLOPs",
        style="dim",
        highlight=False,
    )
    for note in notes(result):
        console.print(f"note: {escape(note)}", style="yellow", highlight=False)
    rows = [row for row in result["models"] if "error" not in row]
    if any(row["weights"].startswith("untrained") for row in rows):
        console.print(UNTRAINED, style="yellow", highlight=False)
    passed = [row["int8"]["file"] for row in quantized if not row["int8"]["refused"]]
    if passed:
        console.print(f"INT8 files in {out}: {', '.join(passed)}", highlight=False)
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.html'} in {result['seconds']:.0f} s")


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a reader of the figures should know: operators without their fast backend, odd weights."""
    found = []
    for operator, backends in result["operators"].items():
        reason = backends.get("cpu")
        if reason:
            found.append(f"{operator} runs on plain PyTorch here, slower: {reason}")
    load, cores = result["load_before"], result["machine"]["cpu"]["usable_cores"]
    if load is not None and load > 0.5 * cores:
        found.append(
            f"Load {load:.1f} on {cores} cores when the demo began: other programs lengthen these times, most of "
            "all PyTorch's with several threads"
        )
    for row in result["models"]:
        _, _, reason = row.get("weights", "").partition("; ")
        if reason:
            found.append(f"{row['model']} is untrained: {reason}")
        if row.get("uncounted_ops"):
            found.append(f"{row['model']}: not in its GMACs: {', '.join(row['uncounted_ops'])}")
    return found


def _table(result: dict[str, Any]) -> Any:
    """Return the table; two lines a model, so that it fits 80 columns."""
    from rich import box
    from rich.table import Table

    title = "One backbone of each category on a photograph"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model\ncategory", min_width=26, overflow="fold")
    eager = ("params\nM", "GMACs", "latency\nms (IQR)", "images\n/s")
    for name in (*eager, "ONNX\nms (IQR)", "ONNX\ndiff"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["models"]:
        start = f"{row['model']}\n[dim]{', '.join(row['categories'])}[/dim]"
        if "error" in row:
            table.add_row(start, "failed")
            continue
        onnx = row["onnx"]
        table.add_row(
            start,
            f"{row['params'] / 1e6:.2f}",
            f"{row['gmacs']:.2f}",
            _spread(row["latency_ms"]),
            f"{row['images_per_second']:.1f}",
            _spread(onnx["latency_ms"]),
            f"{onnx['photo_relative_difference']:.0e}",
        )
    return table


def _int8_table(rows: list[dict[str, Any]]) -> Any:
    """Return the gate's figures of each model, accepted or not."""
    from rich import box
    from rich.table import Table

    title = f"INT8 in ONNX Runtime, recipe {rows[0]['int8']['recipe']}, for {rows[0]['int8']['target']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model\ncategory", min_width=26, overflow="fold")
    for name in ("integer\nMACs", "speed over\nfloat", "logit\nerror", "same\ntop-1", "MB", "accepted"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        gate = row["int8"]
        also = "\n[dim]attention's products too[/dim]" if gate["products"] else ""
        table.add_row(
            f"{row['model']}\n[dim]{', '.join(row['categories'])}[/dim]{also}",
            f"{gate['coverage']:.3f}",
            f"{gate['speed']:.2f}x",
            f"{gate['logit_error']:.1%}",
            f"{gate['top1_agreement']:.0%}",
            f"{gate['size_bytes'] / 1e6:.1f}",
            "no" if gate["refused"] else "yes",
        )
    return table


def _spread(times: dict[str, float]) -> str:
    return f"{times['median']:.1f}\n[dim]({times['iqr']:.1f})[/dim]"
