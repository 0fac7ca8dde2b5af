"""`vitzoo quantize`."""

from __future__ import annotations

import dataclasses
from json import dumps
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
)


@app.command(
    epilog="Example: `vitzoo quantize litv2_small --checkpoint litv2_s.pth --calibration photos -o int8.onnx`"
)
def quantize(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="Folder of images, searched with its subfolders.")],
    recipe: Annotated[str, typer.Option(help="A recipe of ours, or a TOML file.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File: .onnx, .pt2 (PyTorch), .xml (OpenVINO). Default MODEL_RECIPE.onnx."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="x86-vnni, x86-avx2, arm, tensorrt; default: this machine.")
    ] = None,
    img_size: Size = None,
    checkpoint: Weights = None,
    pretrained: Annotated[bool, typer.Option(help="Download the published weights.")] = False,
    kwargs: Settings = None,
    images: Annotated[int, typer.Option(min=16, help="Images to calibrate on.")] = 64,
    held_back: Annotated[int, typer.Option(min=1, help="Other images, to compare on.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    least_coverage: Annotated[float, typer.Option(help="Least share of MACs in integer kernels.")] = 0.9,
    least_speed: Annotated[float, typer.Option(help="Least speed relative to the float file.")] = 1.02,
    error_budget: Annotated[
        float | None, typer.Option(help="Relative logit error allowed; harmful layers stay in float.")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Print what was done to each layer.")] = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="JSON file for what each layer costs alone: SQNR and logit error. Written first."),
    ] = None,
    json: Json = False,
) -> None:
    """Quantize a model to a file that was run in its runtime, compared and timed beside the float one.

    A file for tensorrt, which is not run here, is compared only. Below a threshold the float file is kept and the exit
    code is 1. Recipes of fewer than eight bits are simulated: they print what the network loses, and write no file.
    """
    settings = [*(kwargs or []), *(["pretrained=True"] if pretrained else [])]
    with explained(), progress_bar() as tell:
        from vitzoo.benchmark.models import input_size
        from vitzoo.deploy import Thresholds, export_quantized, format_for, this_machine
        from vitzoo.deploy import quantize as quantized_by
        from vitzoo.export.files import write_text
        from vitzoo.export.quantized import for_target
        from vitzoo.quantization.config import load_recipe
        from vitzoo.quantization.images import load_folder

        thresholds = Thresholds(least_coverage, least_speed)
        goal = target or this_machine()
        chosen = load_recipe(recipe)
        if error_budget is not None:
            chosen = dataclasses.replace(chosen, error_budget=error_budget)
        if format_for(output, goal).name != "torch-export":  # our own kernels do not saturate
            chosen = for_target(chosen, goal)
        tell("build the model")
        built = create(model, img_size, settings, checkpoint).eval()
        found = load_folder(
            calibration, built, input_size(built, parse_img_size(img_size)), images, held_back
        )
        measure = sensitivity is not None
        quantized = quantized_by(
            built,
            chosen,
            found.batches,
            progress=tell,
            measure_layers=measure,
            target=goal,
            threads=threads,
        )
        if quantized.why_float is not None:
            stderr.print(quantized.why_float, style="yellow")
        if sensitivity is not None:
            report = {"model": model, "recipe": chosen.name, "logit_error": quantized.logit_error}
            report |= {"layers": [dataclasses.asdict(layer) for layer in quantized.layers]}
            write_text(sensitivity, dumps(report, indent=1) + "\n")
        gate = None
        if chosen.runs_as_integers:
            path = output or Path(f"{model}_{chosen.name}.onnx")
            gate = export_quantized(
                built, quantized, path, found.held_back, goal, thresholds, threads, progress=tell
            )
    if found.skipped:
        stderr.print(f"[yellow]{len(found.skipped)} images could not be read and were skipped[/yellow]")
    result = {
        "model": model,
        "recipe": chosen.name,
        "target": goal,
        "path": None if gate is None else str(path),
        "calibration_images": sum(map(len, found.batches)),
        "skipped_images": len(found.skipped),
        "calibration_logit_error": quantized.logit_error,
        "quantized_macs": quantized.quantized_macs,
        **({} if gate is None else dataclasses.asdict(gate)),
    }
    if json:
        print_json({**result, "layers": [dataclasses.asdict(layer) for layer in quantized.layers]})
        return
    if gate is None:
        stderr.print(f"recipe {chosen.name} is simulated: no runtime executes it, and no file was written")
    result.pop("floating", None)
    print_table(model, ["field", "value"], [[k, v] for k, v in result.items()])
    if layers:
        columns = ["name", "kind", "mode", "bits", "macs", "sqnr_db", "logit_error", "smooth", "why"]
        print_table("layers", columns, [[_shown(getattr(x, c)) for c in columns] for x in quantized.layers])


def _shown(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
