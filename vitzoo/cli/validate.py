"""`vitzoo validate`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from vitzoo.cli.common import (
    Json,
    Settings,
    Size,
    Weights,
    app,
    check_csv,
    explained,
    model_arguments,
    parse_img_size,
    print_json,
    print_table,
    progress_bar,
    stderr,
)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not numbers separated by commas", param_hint=option) from error


@app.command(
    epilog="Examples: `vitzoo validate litv2_small --checkpoint litv2_s.pth --data val` · "
    "`vitzoo validate litv2_small_int8.onnx --data val -o accuracy.jsonl`"
)
def validate(
    model: Annotated[
        str, typer.Argument(help="Model name, model.tag, or an exported FILE: .onnx, .pt2, .xml.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with one subfolder a class.")],
    checkpoint: Weights = None,
    pretrained: Annotated[bool, typer.Option(help="Download the published weights.")] = False,
    img_size: Size = None,
    kwargs: Settings = None,
    class_map: Annotated[
        Path | None, typer.Option(help="Text file that names the folder of each class, one a line.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Of the channels, separated by commas.")] = None,
    std: Annotated[str | None, typer.Option(help="Of the channels, separated by commas.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bicubic, bilinear, ...")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the shorter side that is kept.")] = None,
    crop_mode: Annotated[str | None, typer.Option(help="center, squash, border.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images a call.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON Lines file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The result as a CSV file in timm's columns, too.")] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    json: Json = False,
) -> None:
    """Count how many labelled images a model, or a file that was exported, classifies correctly.

    Preprocessing and labels are the model's own, or those of the JSON file beside an exported one; options change them.
    """
    arguments = model_arguments(kwargs, checkpoint, pretrained)
    changes = {
        "mean": _numbers(mean, "--mean"),
        "std": _numbers(std, "--std"),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    size = parse_img_size(img_size)
    with explained(), progress_bar() as tell, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        from vitzoo.benchmark.results import write_csv
        from vitzoo.deploy import validate as validated

        check_csv(csv, force)
        found = validated(
            model,
            data,
            kwargs=arguments,
            img_size=size,
            preprocessing=changes,
            class_map=class_map,
            batch_size=batch_size,
            workers=workers,
            threads=threads,
            device=device,
            output=output,
            force=force,
            progress=tell,
        )
        row = found.to_row()
        if csv is not None:
            write_csv([row], csv)
    for warning in said:
        stderr.print(f"warning: {warning.message}", markup=False, soft_wrap=True)
    if found.skipped:
        stderr.print(f"[yellow]{len(found.skipped)} images could not be read and were skipped[/yellow]")
    if json:
        print_json(row)
        return
    print_table(f"{model} on {data}", ["field", "value"], [[k, v] for k, v in row.items() if k != "mode"])
