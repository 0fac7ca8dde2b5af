"""`vitzoo bench` and `vitzoo compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitzoo.cli.common import (
    Json,
    Settings,
    app,
    check_csv,
    explained,
    parse_arguments,
    parse_img_size,
    print_json,
    print_table,
    progress_bar,
    stderr,
)

_SWEEP = "Several, separated by commas, are swept over."
_EXAMPLES = (
    "Examples: `vitzoo bench evit_small_patch16_224 deit_small_patch16_224 --batch-size 1,8 -o results.jsonl` · "
    "`vitzoo bench litv2_small --against timm:swin_tiny_patch4_window7_224 --against mine.onnx` · "
    "`vitzoo bench --suite headlines --quick -o results.jsonl`"
)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str | None, option: str) -> list[Any]:
    if text is None:
        return [None]
    try:
        return [int(part) for part in _list(text)]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not whole numbers separated by commas", param_hint=option
        ) from error


_FAR_FROM_EAGER = 1e-2
# options that a suite's file does not settle
_WITH_SUITE = ("suite", "quick", "output", "csv", "force", "json")


@app.command(epilog=_EXAMPLES)
def bench(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(help="Models, measured side by side in interleaved rounds.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A suite of ours (quick, headlines) or a TOML file, instead of models.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="The suite's short form.")] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Baseline for the ratios: a name, timm:NAME or FILE.onnx; may be repeated."),
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", help=f"Images a call; never made smaller. {_SWEEP}")
    ] = "1",
    img_size: Annotated[
        str | None, typer.Option(help=f"Side in pixels, or HxW; default: the model's own. {_SWEEP}")
    ] = None,
    threads: Annotated[str | None, typer.Option(help=f"CPU threads. {_SWEEP}")] = None,
    dtype: Annotated[str, typer.Option(help=f"float32, bfloat16, float16, int8. {_SWEEP}")] = "float32",
    memory_format: Annotated[str, typer.Option(help=f"contiguous, channels_last. {_SWEEP}")] = "contiguous",
    runtime: Annotated[str, typer.Option(help=f"eager, compiled, onnxruntime, openvino. {_SWEEP}")] = "eager",
    mode: Annotated[str, typer.Option(help=f"infer, train. {_SWEEP}")] = "infer",
    attention: Annotated[
        str, typer.Option(help=f"default, matrix (form the attention matrix). {_SWEEP}")
    ] = "default",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Seconds on each model after its warm-up.")] = 2.0,
    min_rounds: Annotated[int, typer.Option(help="Rounds at least.")] = 10,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory, in a fresh process each.")
    ] = True,
    isolate: Annotated[bool, typer.Option(help="Time every model in a process of its own.")] = False,
    passes: Annotated[
        int, typer.Option(help="Divide the timing among so many fresh processes of each model.")
    ] = 1,
    kwargs: Settings = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON Lines file, written row by row.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="The rows as a CSV file in timm's columns, too.")] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    json: Json = False,
) -> None:
    """Measure throughput, latency and memory of models side by side, over sweeps of settings."""
    _check_choice(context, bool(models), suite, quick)
    arguments = parse_arguments(kwargs)
    sizes: list[Any] = [parse_img_size(part) for part in _list(img_size)] if img_size is not None else [None]
    with explained(), progress_bar() as tell:
        import vitzoo
        from vitzoo.benchmark.suite import run_suite

        check_csv(csv, force)
        if suite is not None:
            results = run_suite(suite, quick, output, force, tell)
        else:
            results = vitzoo.benchmark(
                models or [],
                batch_size=_numbers(batch_size, "--batch-size"),
                img_size=sizes,
                threads=_numbers(threads, "--threads"),
                dtype=_list(dtype),
                memory_format=_list(memory_format),
                runtime=_list(runtime),
                mode=_list(mode),
                attention=_list(attention),
                device=device,
                kwargs=arguments,
                against=against or [],
                seconds=seconds,
                min_rounds=min_rounds,
                memory=memory,
                isolate=isolate,
                passes=passes,
                output=output,
                force=force,
                progress=tell,
            )
    _finish(results, csv, json)


def _check_choice(context: typer.Context, models: bool, suite: str | None, quick: bool) -> None:
    """Refuse what would be ignored: models or settings beside a suite, which has its own, or --quick without one."""
    if models == (suite is not None):
        raise typer.BadParameter("name models or a --suite, one of the two", param_hint="MODELS")
    if quick and suite is None:
        raise typer.BadParameter("is a form of a --suite", param_hint="--quick")
    if suite is not None:
        given = [name for name in context.params if _given(context, name) and name not in _WITH_SUITE]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise typer.BadParameter(f"a suite settles {names} in its file", param_hint="--suite")


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _finish(results: Any, csv: Path | None, json: bool) -> None:
    """Print what was found and write the views of it; exit with 1 if a model failed."""
    from vitzoo.benchmark.results import write_csv

    if csv is not None:
        with explained():
            write_csv(results.rows, csv)
    if json:
        rows = [{k: v for k, v in row.items() if k != "samples_s"} for row in results.rows]
        print_json({**results.header, "rows": rows, "claims": results.claims})
    else:
        _print_results(results)
    for row in results.rows:
        if row.get("uncounted_ops"):
            names = ", ".join(row["uncounted_ops"])
            stderr.print(f"warning: {row['label']}: FLOPs not counted of {names}", markup=False)
        difference = row.get("difference_from_eager") or 0.0
        if difference > _FAR_FROM_EAGER and row["precision"] != "int8":
            stderr.print(
                f"warning: {row['label']}: its file's output is {difference:.2g} from eager's", markup=False
            )
        if "peak_mem_error" in row:
            stderr.print(f"warning: {row['label']}: peak memory: {row['peak_mem_error']}", markup=False)
    if results.failed:
        raise typer.Exit(1)


def _print_results(results: Any) -> None:
    from vitzoo.benchmark.view import claims_table, table

    cpu = results.header["machine"]["cpu"]
    where = f"{cpu['model']} ({cpu['torch_capability']})"
    parts: dict[str, list[Any]] = {}
    for row in results.rows:
        parts.setdefault(row.get("comparison", ""), []).append(row)
    for name, rows in parts.items():
        title, frame = table(rows)
        title = ", ".join(part for part in (name, title, where) if part)
        print_table(title, list(frame.columns), frame.values.tolist())
    if results.claims:
        frame = claims_table(results.claims)
        print_table(f"claims, as measured on {where}", list(frame.columns), frame.values.tolist())


@app.command(epilog="Example: `vitzoo compare before.jsonl after.jsonl`")
def compare(
    first: Annotated[Path, typer.Argument(help="Result file to compare with.")],
    second: Annotated[Path, typer.Argument(help="Result file to judge.")],
    confidence: Annotated[float, typer.Option(help="Of the interval of each ratio.")] = 0.99,
    json: Json = False,
) -> None:
    """Set two result files side by side; a verdict only where a ratio's interval excludes 1."""
    from vitzoo.benchmark.compare import compare_files

    with explained():
        found = compare_files(first, second, confidence)
    if json:
        print_json(found.to_dict())
        return
    columns = [
        "model",
        "setting",
        "before ms",
        "after ms",
        "ratio",
        f"{confidence:.0%} interval",
        "verdict",
        "beside baseline",
        "verdict",
        "memory",
    ]
    print_table(
        f"{first} -> {second}; a ratio above 1 is faster", columns, [_compared(d) for d in found.differences]
    )
    for which, labels in (("first", found.only_first), ("second", found.only_second)):
        if labels:
            stderr.print(f"only in the {which}: {', '.join(labels)}", markup=False)
    for name, values in found.machines.items():
        stderr.print(f"differs: {name}: {values[0]} -> {values[1]}", markup=False)


def _compared(difference: Any) -> list[Any]:
    from vitzoo.benchmark.view import setting

    ratio = difference.ratio
    start = [difference.row["label"], setting(difference.row)]
    if ratio is None:
        return [*start, difference.note, *[None] * 7]
    interval = _interval(ratio)
    beside = difference.relative and f"{difference.relative.value:.3f} ({_interval(difference.relative)})"
    memory = None if difference.memory is None else f"{difference.memory:.2f}x"
    times = [f"{1e3 * seconds:.2f}" for seconds in (difference.before, difference.after)]
    verdicts = difference.verdict or None, difference.relative_verdict or None
    return [*start, *times, f"{ratio.value:.3f}", interval, verdicts[0], beside, verdicts[1], memory]


def _interval(ratio: Any) -> str | None:
    return None if ratio.low != ratio.low else f"{ratio.low:.3f}-{ratio.high:.3f}"
