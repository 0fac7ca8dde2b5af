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
    console.print(f"wrote {out / 'demo.json'} and {out / 'demo.html'} in {result['seconds']:.0f} s")


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a reader of the figures should know: operators without their fast backend, odd weights."""
    found = []
    for operator, backends in result["operators"].items():
        reason = backends.get("cpu")
        if reason:
            found.append(f"{operator} runs on plain PyTorch here, slower: {reason}")
    for row in result["models"]:
        _, _, reason = row.get("weights", "").partition("; ")
        if reason:
            found.append(f"{row['model']} is untrained: {reason}")
        if row.get("uncounted_ops"):
            found.append(f"{row['model']}: not in its GMACs: {', '.join(row['uncounted_ops'])}")
    return found


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="One backbone of each category on a photograph")
    for name in ("model", "category"):
        table.add_column(name, no_wrap=name == "model")
    for name in (
        "params\nM",
        "GMACs",
        "latency\nms (IQR)",
        "images/s",
        "ONNX\nMB",
        "ONNX ms\n(IQR)",
        "ONNX\ndifference",
    ):
        table.add_column(name, justify="right")
    for row in result["models"]:
        start = (row["model"], ", ".join(row["categories"]))
        if "error" in row:
            table.add_row(*start, "failed")
            continue
        eager, onnx = row["latency_ms"], row["onnx"]
        table.add_row(
            *start,
            f"{row['params'] / 1e6:.2f}",
            f"{row['gmacs']:.2f}",
            f"{eager['median']:.1f} ({eager['iqr']:.1f})",
            f"{row['images_per_second']:.1f}",
            f"{onnx['size_bytes'] / 1e6:.1f}",
            f"{onnx['latency_ms']['median']:.1f} ({onnx['latency_ms']['iqr']:.1f})",
            f"{onnx['photo_relative_difference']:.1e}",
        )
    return table
