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


@app.command(
    epilog="Examples: `vitzoo export litv2_small --checkpoint litv2_s.pth -o litv2_small.onnx` · "
    "`vitzoo export cvt_13 --dynamic-size -o cvt_13.pt2`"
)
def export(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File; its suffix says the format. Default MODEL.onnx."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="onnx (.onnx), torch-export (.pt2), openvino (.xml and .bin).")
    ] = None,
    img_size: Size = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Make height and width dynamic, not the batch alone.")
    ] = False,
    checkpoint: Weights = None,
    pretrained: Annotated[bool, typer.Option(help="Download the published weights.")] = False,
    kwargs: Settings = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    check: Annotated[bool, typer.Option(help="Run the file in its runtime beside PyTorch.")] = True,
    json: Json = False,
) -> None:
    """Export a model to a file with a dynamic batch, compare it with PyTorch, and write a JSON file beside it.

    The JSON file has preprocessing, labels, hashes and what was compared. `vitzoo quantize` writes INT8 files.
    """
    settings = [*(kwargs or []), *(["pretrained=True"] if pretrained else [])]
    with explained(), progress_bar() as tell:
        from vitzoo.benchmark.models import input_size
        from vitzoo.deploy import export_model, format_of

        kind = format_of(output, format)
        tell("build the model")
        built = create(model, img_size, settings, checkpoint)
        path = output or Path(f"{model}{kind.suffix}")
        size = input_size(built, parse_img_size(img_size))
        report = export_model(built, path, kind.name, size, opset, check, tell, dynamic_size)
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
    int8: Annotated[bool, typer.Option("--int8", help="Quantize each too; up to minutes a model.")] = False,
    json: Json = False,
) -> None:
    """Run one backbone of each category on a real photograph: count, time, export, compare."""
    with explained():
        from vitzoo.demo import run

        result = run(out, models or None, threads, pretrained, int8=int8, console=stderr if json else stdout)
    if json:
        print_json(result)
