r"""Time our INT8 roads beside those of ONNX Runtime, OpenVINO with NNCF and PyTorch with torchao, all in one run.

    python benchmarks/quantization.py make deit_small_patch16_224 --folder files
    python benchmarks/quantization_rivals.py make deit_small_patch16_224 --folder files
    python benchmarks/quantization_rivals.py time deit_small_patch16_224 --folder files --threads 2 \
        --output benchmarks/results/quantization_rivals_CPU_ISA.json
    python benchmarks/quantization_rivals.py table --output benchmarks/results/quantization_rivals_CPU_ISA.json

Weights, images, ONNX files and the baseline `ort_default` are those of `benchmarks/quantization.py`. `make` adds what
others make of the same float model and the same 32 calibration images, with their defaults:

- `nncf`: `nncf.quantize` of the float file, preset mixed, model type transformer, run in OpenVINO;
- `pt2e`: torchao's `X86InductorQuantizer` with its default configuration, compiled by Inductor with freezing.

NNCF and torchao are no dependencies: a rival that is not installed is a row that says so. Each row names its runtime
and stands beside the float model of the same runtime, and beside the fastest of all. Candidates take turns in one
process; before each turn all pause, so that waiting threads of one runtime do not take the cores of another.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from quantization import BASELINE, CALIBRATION, HELD_BACK, crops, filled, write_results
from run_kernels import summary, surroundings
from torch import Tensor, nn

import vitzoo
from vitzoo.benchmark.machine import version
from vitzoo.benchmark.timing import Block, compare_blocks, run_block
from vitzoo.deploy import format_of, this_machine, torch_coverage
from vitzoo.deploy.coverage import Coverage
from vitzoo.deploy.inductor import compiled, register_passes
from vitzoo.export.common import ExportError, Run
from vitzoo.export.files import write_text
from vitzoo.export.openvino import convert_onnx
from vitzoo.export.quantized import write_quantized
from vitzoo.quantization.config import load_recipe
from vitzoo.quantization.pt2e import pt2e_graph
from vitzoo.testing import relative_difference

MODELS = (
    "deit_small_patch16_224",
    "litv2_small",
    "cvt_13",
    "convnext_tiny",
    "nextvit_small",
    "efficientvit_m4",
)
RECIPE = "w8a8_openvino"  # of our roads outside ONNX Runtime, which "auto" measures
BUDGET = f"{RECIPE}_3"  # the same as `vitzoo quantize --recipe w8a8_openvino --error-budget 0.03` chooses
ONNX_RECIPE = "w8a8_accurate"
PAUSE = 0.02  # seconds; threads of OpenVINO and PyTorch that spin for work have gone to sleep by then
INSTALL = {"nncf": "pip install nncf", "torchao": "pip install 'torchao==0.18.*'"}


def missing(package: str) -> str | None:
    """Return what a row says of a package that is not installed, None for one that is."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: {INSTALL[package]}"


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def make(names: Sequence[str], kinds: Sequence[str], folder: Path) -> None:
    """Write our files and what each rival makes of each model, or the reason why it makes nothing."""
    for name in names:
        floating = folder / f"{name}.float.onnx"
        if not floating.exists():
            raise SystemExit(f"there is no {floating}; benchmarks/quantization.py make writes it")
        model = filled(name)
        images = crops(model, CALIBRATION, 0)
        if "ours" in kinds:
            _ours(model, name, folder, images)
        for kind, (package, write) in RIVALS.items():
            if kind in kinds:
                facts = _attempt(
                    package, functools.partial(write, model, folder / f"{name}.{kind}", images, floating)
                )
                write_text(folder / f"{name}.{kind}.json", json.dumps(facts, indent=1) + "\n")
                print(name, kind, facts, file=sys.stderr, flush=True)


def _attempt(package: str, write: Callable[[], None]) -> dict[str, Any]:
    reason, start = missing(package), time.perf_counter()
    if reason is not None:
        return {"failed": reason}
    try:
        write()
    except Exception as error:  # what a rival refuses is a result
        return {"failed": failure(error)}
    return {"version": version(package), "seconds": time.perf_counter() - start}


def _ours(model: nn.Module, name: str, folder: Path, images: Tensor) -> None:
    """Write the files of our roads that `benchmarks/quantization.py` does not write."""
    recipes = {recipe: load_recipe(recipe) for recipe in (ONNX_RECIPE, RECIPE)}
    recipes[BUDGET] = dataclasses.replace(recipes[RECIPE], error_budget=0.03)
    made = {label: vitzoo.quantize(model, recipe, images.split(8)) for label, recipe in recipes.items()}
    for label, quantized in made.items():
        write_quantized(quantized, folder / f"{name}.{label}.onnx", model, this_machine())
        with torch.no_grad():
            program = torch.export.export(pt2e_graph(model, quantized), (images[:8],))
        torch.export.save(program, folder / f"{name}.{label}.qdq.pt2")
    for kind in ("float", RECIPE, BUDGET):
        path = folder / f"{name}.{kind}.xml"
        try:
            convert_onnx(path.with_suffix(".onnx"), path)
        except ExportError as error:  # OpenVINO has no operation for what the model needs
            write_text(_facts_of(path), json.dumps({"failed": failure(error)}) + "\n")
            print(path.name, failure(error), file=sys.stderr)
    vitzoo.export_program(vitzoo.convert_int8(model, made[RECIPE]), folder / f"{name}.{RECIPE}.pt2")


def _facts_of(path: Path) -> Path:
    """Return where it says what is true of one file alone, not of all that one recipe gives."""
    return path.with_name(f"{path.name}.json")


def _nncf(model: nn.Module, path: Path, images: Tensor, floating: Path) -> None:
    import nncf
    import openvino

    dataset = nncf.Dataset([x.numpy() for x in images.split(1)])
    quantized = nncf.quantize(
        openvino.Core().read_model(str(floating)),
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(quantized, f"{path}.xml", compress_to_fp16=False)


def _pt2e(model: nn.Module, path: Path, images: Tensor, floating: Path) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    example = (images[:8],)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
        for batch in images.split(8):
            prepared(batch)
        torch.export.save(torch.export.export(convert_pt2e(prepared), example), f"{path}.pt2")


RIVALS = {"nncf": ("nncf", _nncf), "pt2e": ("torchao", _pt2e)}


@dataclasses.dataclass(frozen=True)
class Road:
    """One way to run a model: a file, or the model itself, in a runtime.

    Attributes:
        name: of the row.
        runtime: what runs it.
        by: "float", "ours" or "rival".
        file: what is behind the model's name; None for the model as it is.
        package: what a rival needs.
    """

    name: str
    runtime: str
    by: str
    file: str | None
    package: str | None = None


ROADS = (
    Road("ort_float", "ONNX Runtime", "float", "float.onnx"),
    Road("ort_auto", "ONNX Runtime", "ours", "auto.onnx"),
    Road("ort_accurate", "ONNX Runtime", "ours", f"{ONNX_RECIPE}.onnx"),
    Road("ort_default", "ONNX Runtime", "rival", f"{BASELINE}.onnx"),
    Road("openvino_float", "OpenVINO", "float", "float.xml"),
    Road("openvino_int8", "OpenVINO", "ours", f"{RECIPE}.xml"),
    Road("openvino_budget", "OpenVINO", "ours", f"{BUDGET}.xml"),
    Road("nncf", "OpenVINO", "rival", "nncf.xml", "nncf"),
    Road("torch_float", "PyTorch", "float", None),
    Road("convert_int8", "PyTorch", "ours", f"{RECIPE}.pt2"),
    Road("inductor_float", "Inductor", "float", None),
    Road("lower_int8", "Inductor", "ours", f"{RECIPE}.qdq.pt2", "torchao"),
    Road("lower_budget", "Inductor", "ours", f"{BUDGET}.qdq.pt2", "torchao"),
    Road("lower_accurate", "Inductor", "ours", f"{ONNX_RECIPE}.qdq.pt2", "torchao"),
    Road("pt2e", "Inductor", "rival", "pt2e.pt2", "torchao"),
)


def opened(road: Road, path: Path, model: nn.Module, x: Tensor, threads: int) -> tuple[Run, Coverage]:
    """Return what runs a road and its products."""
    if road.runtime == "Inductor":
        if road.package is not None:
            register_passes()
        module = model if road.file is None else torch.export.load(path).module()
        run, coverage, _ = compiled(module, x)
        return lambda images: [run(images)], coverage
    if road.file is None:
        run = torch.no_grad()(model)
        return lambda images: [run(images)], torch_coverage(model, x.shape[1:])
    kind = format_of(path)
    return kind.open(path, threads), kind.coverage(path, x[:1])


def _block(run: Run, x: Tensor) -> Block:
    def block(calls: int) -> float:
        time.sleep(PAUSE)
        return run_block(functools.partial(run, x), calls)

    return block


def measure(
    name: str, roads: Sequence[Road], folder: Path, threads: int, batch: int, seconds: float
) -> list[dict[str, Any]]:
    """Return the rows of one model, one a road."""
    model = filled(name)
    held_back = crops(model, HELD_BACK, 1)
    x = held_back[:batch]
    with torch.no_grad():
        exact = torch.cat([model(part) for part in held_back.split(batch)])
    rows, runs = [], {}
    for road in roads:
        path = folder / f"{name}.{road.file}"
        row: dict[str, Any] = {"model": name, "road": road.name, "runtime": road.runtime, "by": road.by}
        row |= {"batch": batch, "threads": threads}
        for facts in (path.with_suffix(".json"), _facts_of(path)) if road.file is not None else ():
            row |= json.loads(facts.read_text()) if facts.exists() else {}
        reason = road.package and missing(road.package)
        if reason is not None and "failed" not in row:
            row["failed"] = reason
        rows.append(row)
        if "failed" in row:
            continue
        try:
            run, coverage = opened(road, path, model, x, threads)
        except Exception as error:
            if road.by != "rival":
                raise
            row["failed"] = failure(error)
            continue
        logits = torch.cat([run(part)[0] for part in held_back.split(batch)])
        row |= {
            "coverage": coverage.share,
            "by_kernel": dict(coverage.by_kernel),
            "logit_error": relative_difference(logits, exact),
            "top1_agreement": float((logits.argmax(1) == exact.argmax(1)).float().mean()),
        }
        runs[road.name] = _block(run, x)
        print(name, road.name, f"{row['coverage']:.3f} {row['logit_error']:.4f}", file=sys.stderr, flush=True)
    times = compare_blocks(runs, seconds=seconds, min_rounds=7, threads=threads, images=batch)
    floats = {road.runtime: times[road.name] for road in roads if road.by == "float" and road.name in times}
    fastest = min(floats.values(), key=lambda timing: timing.median)
    for row in rows:
        timing = times.get(row["road"])
        if timing is not None:
            row |= summary(timing)
            row |= {"speed": timing.ratio_to(floats[row["runtime"]]), "fastest_float": fastest.name}
            row["speed_over_fastest_float"] = timing.ratio_to(fastest)
            shown = f"{row['median_ms']:.1f} ms, {row['speed']:.2f}x"
            print(name, row["road"], shown, file=sys.stderr, flush=True)
    return rows


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown: a table a number of threads, a row a road, a column a model."""
    parts = []
    for threads in sorted({row["threads"] for row in record["results"]}):
        found = {(row["model"], row["road"]): row for row in record["results"] if row["threads"] == threads}
        models = list(dict.fromkeys(model for model, _ in found))
        lines = [
            f"| {threads} thread{'s' if threads > 1 else ''} | {' | '.join(models)} |",
            f"| --- | {' | '.join('---:' for _ in models)} |",
        ]
        for road in dict.fromkeys(road for _, road in found):
            cells = [_cell(found[model, road]) if (model, road) in found else "" for model in models]
            lines.append(f"| `{road}` | {' | '.join(cells)} |")
        rows = [row for row in record["results"] if row["threads"] == threads]
        best = [_best([row for row in rows if row["model"] == model]) for model in models]
        lines.append(f"| fastest of ours with less error : fastest rival | {' | '.join(best)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _best(rows: list[dict[str, Any]]) -> str:
    """Return how much faster than the fastest rival the fastest of our roads with less error is, and both errors."""
    timed = sorted((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"])
    rival = next((row for row in timed if row["by"] == "rival"), None)
    if rival is None:
        return ""
    less = (row for row in timed if row["by"] == "ours" and row["logit_error"] < rival["logit_error"])
    ours = next(less, None)
    if ours is None:
        return f"none with less error than `{rival['road']}`"
    ratio = rival["median_ms"] / ours["median_ms"]
    names = f"`{ours['road']}` : `{rival['road']}`"
    return f"{names} {ratio:.2f}x, {ours['logit_error']:.1%} : {rival['logit_error']:.1%}"


def _cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return "failed"
    if row["by"] == "float":
        return f"{row['median_ms']:.1f} ms"
    return f"{row['median_ms']:.1f} ms, {row['speed']:.2f}x, {row['coverage']:.2f}, {row['logit_error']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("make", "time", "table"))
    parser.add_argument("models", nargs="*", default=[*MODELS])
    parser.add_argument("--kinds", nargs="+", default=["ours", *RIVALS], help="what to make")
    parser.add_argument("--roads", nargs="+", default=[road.name for road in ROADS], help="what to time")
    parser.add_argument("--folder", type=Path, default=Path("files"), help="of the models' files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each candidate")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    if args.step == "table":
        print(table(json.loads(args.output.read_text())))
        return
    torch.set_num_threads(args.threads)
    if args.step == "make":
        make(args.models, args.kinds, args.folder)
        return
    roads = [road for road in ROADS if road.name in args.roads]
    results = []
    for name in args.models:
        results += measure(name, roads, args.folder, args.threads, args.batch, args.seconds)
    if args.output is not None:
        machine = {**surroundings(), "rivals": {package: version(package) for package in INSTALL}}
        write_results(args.output, results, ("model", "threads"), machine=machine)


if __name__ == "__main__":
    main()
