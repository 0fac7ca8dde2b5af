"""What the commands share: the application, the two consoles, arguments, errors, tables."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from vitzoo.factory import create_model

app = typer.Typer(
    name="vitzoo",
    help="Efficient vision backbones: list, describe, count, time, export.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

# errors that say what is wrong and what to do; anything else is a defect of ours and shows its trace
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Model = Annotated[str, typer.Argument(help="Model name, or model.tag for one published checkpoint.")]
Size = Annotated[
    str | None, typer.Option("--img-size", help="Side in pixels, or HxW. Default: the model's own.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--kwargs", "-k", help="Constructor argument, `name=value`; may be repeated."),
]
Weights = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights file, as the authors publish it.")
]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that users can mend into one message and exit code 1."""
    try:
        yield
    except _EXPECTED as error:
        stderr.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        stderr.print(" ".join(str(error).split()), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error while the block runs; give the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("start", total=None)

        def tell(step: str, done: float | None = None) -> None:
            bar.update(task, description=step, total=None if done is None else 1.0, completed=done or 0.0)

        yield tell


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table, the first column to the left; None is a dash."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=first)
    for row in rows:
        table.add_row(*("-" if v is None else str(v) for v in row))
    # a pipe or a file has no width: nothing needs to be folded there
    narrow = stdout.is_terminal or "COLUMNS" in os.environ
    (stdout if narrow else Console(highlight=False, width=200)).print(table)


def parse_arguments(settings: list[str] | None) -> dict[str, Any]:
    """Return constructor arguments from `name=value` texts; values are Python literals, or else text."""
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{setting!r} is not of the form name=value", param_hint="--kwargs")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def parse_img_size(text: str | None) -> int | tuple[int, int] | None:
    """Return a side or (H, W) from "224" or "384x512"."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(s.isdecimal() and int(s) > 0 for s in sides):
        raise typer.BadParameter(f"{text!r} is neither a side in pixels nor HxW", param_hint="--img-size")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def model_arguments(
    settings: list[str] | None, weights: Path | None, pretrained: bool = False
) -> dict[str, Any]:
    """Return constructor arguments that load a weights file, or the published one."""
    arguments = parse_arguments(settings)
    if weights is not None:
        overlay = {"file": str(weights)}
        if (
            "num_classes" in arguments
        ):  # else timm drops the file's classifier, since the published one has another
            overlay["num_classes"] = arguments["num_classes"]
        arguments["pretrained_cfg_overlay"] = overlay
    return arguments | ({"pretrained": True} if pretrained or weights is not None else {})


def check_csv(csv: Path | None, force: bool) -> None:
    """Raise, before anything is measured, what writing a CSV file at the end would raise."""
    from vitzoo.benchmark.results import Recorder

    if csv is not None:
        with Recorder(csv, force):
            pass
        csv.unlink()  # it is written at the end


def create(name: str, img_size: str | None, settings: list[str] | None, weights: Path | None) -> nn.Module:
    """Create a model from what the command line says of it."""
    from vitzoo.benchmark.models import create_for

    kwargs = model_arguments(settings, weights)
    size = parse_img_size(img_size)
    return create_model(name, **kwargs) if size is None else create_for(name, size, **kwargs)
