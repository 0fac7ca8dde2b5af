"""The command `vitzoo`: parses, calls, prints; nothing else.

Standard output holds the result, a table or with `--json` one JSON document; progress and messages go to
standard error. Exit codes: 0 done, 1 an error that the message explains, 2 a command line that makes no
sense.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
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

import vitzoo
from vitzoo.factory import create_model

app = typer.Typer(
    name="vitzoo",
    help="Efficient vision backbones: list, describe, count, time, export.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

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
def _explained() -> Iterator[None]:
    """Turn the errors that users can mend into one message and exit code 1."""
    try:
        yield
    except _EXPECTED as error:
        _err.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        _err.print(" ".join(str(error).split()), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error while the block runs; give the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("start", total=None)

        def tell(step: str, done: float | None = None) -> None:
            bar.update(task, description=step, total=None if done is None else 1.0, completed=done or 0.0)

        yield tell


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=first)
    for row in rows:
        table.add_row(*("-" if v is None else str(v) for v in row))
    # a pipe or a file has no width: nothing needs to be folded there
    narrow = _out.is_terminal or "COLUMNS" in os.environ
    (_out if narrow else Console(highlight=False, width=200)).print(table)


def _arguments(settings: list[str] | None) -> dict[str, Any]:
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


def _img_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(s.isdecimal() and int(s) > 0 for s in sides):
        raise typer.BadParameter(f"{text!r} is neither a side in pixels nor HxW", param_hint="--img-size")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _create(name: str, img_size: str | None, settings: list[str] | None, weights: Path | None) -> nn.Module:
    from vitzoo.benchmark.models import create_for

    kwargs = _arguments(settings)
    if weights is not None:
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    size = _img_size(img_size)
    return create_model(name, **kwargs) if size is None else create_for(name, size, **kwargs)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(vitzoo.__version__ + "\n")
        raise typer.Exit


@app.command(
    "list", epilog="Examples: `vitzoo list` · `vitzoo list 'vim*'` · `vitzoo list --category hilo --json`"
)
def list_command(
    filter: Annotated[str, typer.Argument(help="Wildcard pattern.")] = "*",
    category: Annotated[str | None, typer.Option(help=", ".join(vitzoo.CATEGORIES))] = None,
    family: Annotated[str | None, typer.Option(help="Family name, e.g. litv2.")] = None,
    json: Json = False,
) -> None:
    """List the models of the zoo, timm's by reference included."""
    with _explained():
        rows = [_listed(name) for name in vitzoo.list_models(filter, category, family)]
    if json:
        _print_json(rows)
        return
    columns = ["model", "family", "categories", "params (M)", "GMACs", "top-1", "from"]
    cells = [
        [
            r["model"],
            r["family"],
            ", ".join(r["categories"]),
            _millions(r["params"]),
            r["gmacs"],
            r["top1"],
            r["origin"],
        ]
        for r in rows
    ]
    _table(f"{len(rows)} models; figures as published", columns, cells)


def _listed(name: str) -> dict[str, Any]:
    family = vitzoo.registry.family_of(name)
    assert family is not None, "list_models lists members of families only"
    figures = family.models[name]
    return {
        "model": name,
        "family": family.name,
        "categories": family.categories,
        "params": figures.params,
        "gmacs": figures.gmacs,
        "top1": figures.top1,
        "origin": family.origin,
    }


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f}"


@app.command(epilog="Example: `vitzoo info evit_small_patch16_224`")
def info(model: Model, json: Json = False) -> None:
    """Say what is known of a model: paper, licences, published figures, checkpoints."""
    with _explained():
        found = vitzoo.model_info(model)
    if json:
        _print_json(dataclasses.asdict(found))
        return
    fields = dataclasses.asdict(found)
    checkpoints = fields.pop("checkpoints")
    fields["categories"] = ", ".join(found.categories)
    fields["input_size"] = " x ".join(map(str, found.input_size))
    _table(found.name, ["field", "value"], [[k, v] for k, v in fields.items() if k != "name"])
    rows = [
        [
            c["name"],
            ", ".join(f"{k}={v}" for k, v in c["args"].items()),
            c["top1"],
            c["url"] or c["get"],
            c["license"],
        ]
        for c in checkpoints
    ]
    _table("checkpoints", ["tag", "sets", "top-1", "file", "licence"], rows)


@app.command(
    epilog="Examples: `vitzoo flops vim_tiny_patch16_224` · `vitzoo flops litv2_small --img-size 384x512`"
)
def flops(
    model: Model,
    img_size: Size = None,
    kwargs: Settings = None,
    scan_convention: Annotated[
        str, typer.Option(help="exact, or paper (9BLDN, as Mamba papers count).")
    ] = "exact",
    depth: Annotated[int, typer.Option(help="Module levels to show.")] = 1,
    json: Json = False,
) -> None:
    """Count multiply-accumulates and FLOPs of one image, by kind and by module."""
    from vitzoo.benchmark.flops import count_flops
    from vitzoo.benchmark.models import input_size

    with _explained():
        built = _create(model, img_size, kwargs, None)
        size = input_size(built, _img_size(img_size))
        count = count_flops(built, input_size=size, scan_convention=scan_convention)
    if count.uncounted_ops:
        _err.print(
            f"warning: not counted, for want of a formula: {', '.join(count.uncounted_ops)}", markup=False
        )
    if json:
        _print_json({"model": model, **count.to_dict()})
        return
    rows = [["total", f"{count.gmacs:.4f}", f"{count.gflops:.4f}"]]
    rows += [[f"kind: {k}", f"{v:.4f}", f"{2 * v:.4f}"] for k, v in count.by_kind.items()]
    rows += [
        [name, f"{v:.4f}", f"{2 * v:.4f}"]
        for name, v in count.by_module.items()
        if name.count(".") < depth and v
    ]
    _table(
        f"{model} at {'x'.join(map(str, size))}, {count.params:,} parameters",
        ["what", "GMACs", "GFLOPs"],
        rows,
    )


@app.command(epilog="Example: `vitzoo bench evit_small_patch16_224 deit_small_patch16_224 --batch-size 8`")
def bench(
    models: Annotated[list[str], typer.Argument(help="Models, measured side by side in interleaved rounds.")],
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images a call; never made smaller.")
    ] = 1,
    img_size: Size = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds on each model after its warm-up.")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kwargs: Settings = None,
    json: Json = False,
) -> None:
    """Measure throughput and latency: median, quartile distance, percentiles."""
    from vitzoo.benchmark.machine import machine
    from vitzoo.benchmark.models import BenchSettings, benchmark_models

    size, arguments = _img_size(img_size), _arguments(kwargs)
    with _explained(), _progress() as tell:
        settings = BenchSettings(batch_size, size, threads, seconds, device=device, kwargs=arguments)
        rows = benchmark_models(models, settings, tell)
    if json:
        _print_json({"machine": machine(), "rows": rows})
    else:
        _print_bench(rows, machine())
    for row in rows:
        if row.get("uncounted_ops"):
            _err.print(f"warning: {row['model']}: FLOPs not counted of {row['uncounted_ops']}", markup=False)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _print_bench(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    columns = ["model", "images/s", "ms", "IQR ms", "p90 ms", "ratio", "GMACs", "params (M)"]
    base = next((r["infer_samples_per_sec"] for r in rows if "error" not in r), 1.0)
    cells: list[list[Any]] = []
    for row in rows:
        if "error" in row:
            cells.append([row["model"], row["error"], *[None] * 6])
            continue
        speed = row["infer_samples_per_sec"]
        numbers = [speed, *(row[k] for k in ("infer_step_time", "iqr_ms", "p90_ms")), speed / base]
        numbers.append(row["infer_gmacs"])
        cells.append([row["model"], *(f"{n:.2f}" for n in numbers), f"{row['param_count']:.1f}"])
    good = next((r for r in rows if "error" not in r), {})
    title = f"batch {good.get('infer_batch_size')}, {good.get('threads')} threads, {where['cpu']['model']} "
    _table(title + f"({where['cpu']['torch_capability']})", columns, cells)


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
    with _explained(), _progress() as tell:
        from vitzoo.benchmark.models import input_size
        from vitzoo.export import export_onnx

        tell("build the model")
        built = _create(model, img_size, settings, checkpoint)
        path = output or Path(f"{model}.onnx")
        report = export_onnx(built, path, input_size(built, _img_size(img_size)), opset, check, tell)
    if json:
        _print_json({"model": model, **report.to_dict()})
        return
    rows = [[k, v] for k, v in report.to_dict().items() if k != "nodes"]
    _table(model, ["field", "value"], [*rows, ["nodes", sum(report.nodes.values())]])


@app.command(epilog="Example: `vitzoo demo --out results`")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.html.")] = Path("results"),
    models: Annotated[list[str] | None, typer.Option("--model", help="Model; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Try to download the published weights.")] = False,
    json: Json = False,
) -> None:
    """Run one backbone of each category on a real photograph: count, time, export, compare."""
    with _explained():
        from vitzoo.demo import run

        result = run(out, models or None, threads, pretrained, console=_err if json else _out)
    if json:
        _print_json(result)


@app.command(epilog="Example: `vitzoo doctor --json`")
def doctor(json: Json = False) -> None:
    """Say what works here: versions, processor, each operator's backends or why not."""
    from vitzoo.doctor import diagnose

    with _explained():
        found = diagnose()
    if json:
        _print_json(found)
        return
    cpu = found["machine"]["cpu"]
    rows = [[name, number] for name, number in found["machine"]["versions"].items()]
    rows += [["CPU", cpu["model"]], ["instruction sets", " ".join(cpu["flags"])]]
    rows += [["cores, threads", f"{cpu['usable_cores']}, {cpu['threads']}"]]
    rows += [["GPU", ", ".join(g["name"] for g in found["machine"]["gpus"]) or "none that PyTorch can use"]]
    extension = found["extension"]
    rows += [["vitzoo._C", extension["why_not"] or f"loaded, instruction set {extension['isa']}"]]
    _table("this machine", ["what", "found"], rows)
    backends = [
        [entry["operator"], name, reason or ("runs here" if name == entry["runs"] else "available")]
        for entry in found["operators"]
        for name, reason in entry["backends"].items()
    ]
    _table("operators", ["operator", "backend", "state"], backends)
    packages = [
        [name, p["version"] or "missing", p["for"], "" if p["version"] else p["install"]]
        for name, p in found["packages"].items()
    ]
    _table("optional packages", ["package", "version", "for", "install"], packages)


def main() -> None:
    """Run the command line."""
    app()
