"""`vitzoo export` and `vitzoo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitzoo.cli.common import (
    Json,
    Model,
    Settings,
    Size,
    Weights,
    app,
    create,
    explained,
    parse_img_size,
    print_json,
    print_table,
    progress_bar,
    stderr,
    stdout,
)


@app.command(epilog="Example: `vitzoo export litv2_small --checkpoint litv2_s.pth -o litv2_small.onnx`")
def export(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; default MODEL.onnx.")] = None,
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    img_size: Size = None,
    checkpoint: Weights = None,
    pretrained: Annotated[bool, typer.Option(help="Download the published weights.")] = False,
    kwargs: Settings = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    check: Annotated[bool, typer.Option(help="Run the file in ONNX Runtime beside PyTorch.")] = True,
    json: Json = False,
) -> None:
    """Export a model to a file with a dynamic batch, and compare it with PyTorch."""
    if format != "onnx":
        raise typer.BadParameter(f"{format!r} is not available, only onnx", param_hint="--format")
    settings = [*(kwargs or []), *(["pretrained=True"] if pretrained else [])]
    with explained(), progress_bar() as tell:
        from vitzoo.benchmark.models import input_size
        from vitzoo.export import export_onnx

        tell("build the model")
        built = create(model, img_size, settings, checkpoint)
        path = output or Path(f"{model}.onnx")
        report = export_onnx(built, path, input_size(built, parse_img_size(img_size)), opset, check, tell)
    if json:
        print_json({"model": model, **report.to_dict()})
        return
    rows = [[k, v] for k, v in report.to_dict().items() if k != "nodes"]
    print_table(model, ["field", "value"], [*rows, ["nodes", sum(report.nodes.values())]])


@app.command(epilog="Example: `vitzoo demo --out results`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.html.")] = Path("results"),
    models: Annotated[list[str] | None, typer.Option("--model", help="Model; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Try to download the published weights.")] = False,
    json: Json = False,
) -> None:
    """Run one backbone of each category on a real photograph: count, time, export, compare."""
    with explained():
        from vitzoo.demo import run

        result = run(out, models or None, threads, pretrained, console=stderr if json else stdout)
    if json:
        print_json(result)
