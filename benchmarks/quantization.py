r"""Time INT8 files beside the float file in ONNX Runtime, with their integer coverage and logit error.

    python benchmarks/quantization.py make deit_small_patch16_224 vim_tiny_patch16_224 --folder files
    python benchmarks/quantization.py time deit_small_patch16_224 --folder files --threads 2 \
        --output benchmarks/results/quantization_CPU_ISA.json
    python benchmarks/quantization.py table --output benchmarks/results/quantization_CPU_ISA.json

`make` writes, for each model, the float file, one by each recipe, and the baseline that ONNX Runtime's own
`quantize_static` makes of the float file with its defaults. `time` runs them interleaved, and in the same run an int8
and a float32 product of M 1576, K 384, N 1536, whose ratio is what the machine's integer units give at best; a model's
rows replace those that the output file has of it. `table` prints the file as Markdown.

Weights are filled by name and shape as in the tests, normal with 1 / sqrt(fan in): no network has learned to tolerate
noise here. Statistics of BatchNorm are then those of photographs, as in every trained network: with others activations
grow from layer to layer, and eight bits in any one layer change the logits by half. Images are crops of scikit-learn's
two photographs, 32 to calibrate on, 16 others to compare on. Recipes are made for this machine. OpenVINO, NNCF and
torchao are measured by `benchmarks/quantization_rivals.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from run_kernels import summary, surroundings
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import vitzoo
from vitzoo.benchmark.timing import compare
from vitzoo.deploy import onnxruntime_coverage, quantize, this_machine
from vitzoo.export import export_onnx
from vitzoo.export.check import open_session, run_session, session_options
from vitzoo.export.files import write_text
from vitzoo.export.quantized import for_target, write_quantized
from vitzoo.quantization.config import load_recipe
from vitzoo.testing import fill, relative_difference

MODELS = (
    "deit_small_patch16_224",
    "litv2_small",
    "cvt_13",
    "convnext_tiny",
    "efficientvit_m4",
    "nextvit_small",
    "vim_tiny_patch16_224",
)
RECIPES = ("auto", "w8a8")
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
CALIBRATION, HELD_BACK = 32, 16
BASELINE = "ort_default"
M, K, N = 1576, 384, 1536


def filled(name: str) -> nn.Module:
    """Return a model whose weights are defined by their names and shapes."""
    model = vitzoo.create_model(name).eval()
    weights = {
        key: torch.from_numpy(np.asarray(fill(key, tuple(value.shape)))).reshape(value.shape)
        if value.is_floating_point()
        else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    # not those of pooled features, which differ too little between two photographs
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over batches
        norm.train()
    if norms:
        with torch.no_grad():
            for images in crops(model, 32, 2).split(16):
                model(images)
    return model.eval()


def crops(model: nn.Module, count: int, seed: int) -> Tensor:
    """Return square crops of the photographs, half of them mirrored, prepared as the model takes them."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    photographs = [Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS]
    random, images = np.random.RandomState(seed), []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        width, height = photograph.size
        side = random.randint(150, height)
        left, top = random.randint(0, width - side + 1), random.randint(0, height - side + 1)
        crop = photograph.crop((left, top, left + side, top + side))
        if random.rand() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(transform(crop))
    return torch.stack(images)


def make(names: list[str], recipes: list[str], folder: Path, threads: int) -> None:
    """Write the files of each model and, beside them, what was done."""
    folder.mkdir(parents=True, exist_ok=True)
    target = this_machine()
    for name in names:
        model = filled(name)
        calibration = crops(model, CALIBRATION, 0).split(8)
        floating = folder / f"{name}.float.onnx"
        export_onnx(model, floating, check=False)
        for recipe in recipes:
            start = time.perf_counter()
            chosen = for_target(load_recipe(recipe), target)
            quantized = quantize(model, chosen, calibration, target=target, threads=threads)
            write_quantized(quantized, folder / f"{name}.{recipe}.onnx", model, target)
            modes = [layer.mode for layer in quantized.layers if layer.kind != "product"]
            facts = {
                "modes": {mode: modes.count(mode) for mode in sorted({*modes})},
                "calibration_logit_error": quantized.logit_error,
                "seconds": time.perf_counter() - start,
            }
            write_text(folder / f"{name}.{recipe}.json", json.dumps(facts, indent=1) + "\n")
            print(name, recipe, facts, file=sys.stderr, flush=True)
        _baseline(floating, folder / f"{name}.{BASELINE}.onnx", torch.cat(calibration))


class _Images:
    """Calibration images one by one, as `quantize_static` takes them."""

    def __init__(self, images: Tensor) -> None:
        self.left: Iterator[Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        x = next(self.left, None)
        return None if x is None else {"input": x.numpy()}


def _baseline(floating: Path, path: Path, images: Tensor) -> None:
    """Write what ONNX Runtime's own tool makes of a float file with its defaults, or the reason why it does not."""
    from onnxruntime.quantization import quantize_static

    try:
        quantize_static(str(floating), str(path), _Images(images))
    except Exception as error:
        path.unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        write_text(path.with_suffix(".json"), json.dumps({"failed": reason}) + "\n")
        print(floating.name, BASELINE, reason, file=sys.stderr)


def measure(
    name: str,
    recipes: list[str],
    folder: Path,
    threads: int,
    batch: int,
    seconds: float,
    product_ratio: float,
) -> list[dict[str, Any]]:
    """Return the rows of one model: each file beside the float file."""
    model = filled(name)
    held_back = crops(model, HELD_BACK, 1)
    x = held_back[torch.arange(batch) % len(held_back)]
    paths = {kind: folder / f"{name}.{kind}.onnx" for kind in ("float", *recipes, BASELINE)}
    present = {kind: path for kind, path in paths.items() if path.exists()}
    sessions = {kind: open_session(path, threads) for kind, path in present.items()}
    outputs = {
        kind: torch.cat([run_session(session, part)[0] for part in held_back.split(8)])
        for kind, session in sessions.items()
    }
    times = compare(
        {kind: functools.partial(run_session, session, x) for kind, session in sessions.items()},
        seconds=seconds,
        min_rounds=7,
        threads=threads,
        images=batch,
    )
    rows = []
    for kind, path in paths.items():
        facts = path.with_suffix(".json")
        row: dict[str, Any] = {"model": name, "file": kind, "batch": batch, "threads": threads}
        row["product_ratio"] = product_ratio
        row |= json.loads(facts.read_text()) if facts.exists() else {}
        if kind in present:
            found = onnxruntime_coverage(path, held_back[:1])
            agreement = (outputs[kind].argmax(1) == outputs["float"].argmax(1)).float().mean()
            row |= summary(times[kind]) | {
                "speed": times[kind].ratio_to(times["float"]),
                "coverage": found.share,
                "logit_error": relative_difference(outputs[kind], outputs["float"]),
                "top1_agreement": float(agreement),
            }
        rows.append(row)
        shown = {key: row[key] for key in ("median_ms", "speed", "coverage", "logit_error") if key in row}
        print(name, kind, {key: round(value, 4) for key, value in shown.items()}, file=sys.stderr, flush=True)
    return rows


def products(threads: int, seconds: float) -> dict[str, Any]:
    """Time one product of u8 x s8 with a constant second factor, as weights are, beside the float32 one."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def session(kind: str, a: Any, b: Any, out: int) -> Any:
        first = helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        result = helper.make_tensor_value_info("y", out, (M, N))
        node = helper.make_node(kind, ["a", "b"], ["y"])
        graph = helper.make_graph([node], kind, [first], [result], [numpy_helper.from_array(b, "b")])
        opset = helper.make_opsetid("", 20)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        onnx.checker.check_model(model)
        made = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(threads), ["CPUExecutionProvider"]
        )
        return functools.partial(made.run, None, {"a": a})

    random = np.random.RandomState(0)
    a, b = random.randn(M, K).astype(np.float32), random.randn(K, N).astype(np.float32)
    codes = random.randint(0, 255, (M, K)).astype(np.uint8), random.randint(-64, 64, (K, N)).astype(np.int8)
    times = compare(
        {
            "float32": session("MatMul", a, b, TensorProto.FLOAT),
            "int8": session("MatMulInteger", *codes, TensorProto.INT32),
        },
        seconds=seconds,
        threads=threads,
    )
    ratio = times["int8"].ratio_to(times["float32"])
    return {"m": M, "k": K, "n": N, "threads": threads, "ratio": ratio} | {
        kind: {**summary(timing), "gops": 2e-9 * M * K * N / timing.median} for kind, timing in times.items()
    }


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown, a row a model.

    Of each file: speed, what share that is of the ratio of the two products, coverage and logit error; a dot for a
    file that was not made.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["results"]:
        rows.setdefault(row["model"], {})[row["file"]] = row
    kinds = [kind for kind in next(iter(rows.values())) if kind != "float"]
    lines = [
        f"| model | float ms | product | {' | '.join(kinds)} |",
        f"| --- | ---: | ---: | {' | '.join('---:' for _ in kinds)} |",
    ]
    for model, found in rows.items():
        cells = [_cell(found.get(kind, {})) for kind in kinds]
        start = f"| {model} | {found['float']['median_ms']:.1f} | {found['float']['product_ratio']:.2f}x"
        lines.append(f"{start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return "failed"
    if "speed" not in row:
        return "."
    share = row["speed"] / row["product_ratio"]
    return f"{row['speed']:.2f}x ({share:.0%}), {row['coverage']:.2f}, {row['logit_error']:.1%}"


def write_results(
    path: Path, results: list[dict[str, Any]], keys: tuple[str, ...], machine: dict[str, Any], **facts: Any
) -> None:
    """Write rows in the place of those of the file that have the same keys, below the machine and facts of this run.

    Rows that stay are of another run: each says the commit, time and load of its own.
    """
    before = json.loads(path.read_text())["results"] if path.exists() else []
    new = {tuple(row[key] for key in keys) for row in results}
    kept = [row for row in before if tuple(row[key] for key in keys) not in new]
    own = {key: machine[key] for key in ("commit", "time", "load")}
    stamped = [row | own for row in results]
    record = {"machine": machine, **facts, "results": [*kept, *stamped]}
    write_text(path, json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("make", "time", "table"))
    parser.add_argument("models", nargs="*", default=[*MODELS])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES])
    parser.add_argument("--folder", type=Path, default=Path("files"), help="of the ONNX files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each file")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    if args.step == "table":
        print(table(json.loads(args.output.read_text())))
        return
    torch.set_num_threads(args.threads)
    if args.step == "make":
        make(args.models, args.recipes, args.folder, args.threads)
        return
    product = products(args.threads, args.seconds)
    print("int8 : float32 product", round(product["ratio"], 2), file=sys.stderr, flush=True)
    results = []
    for name in args.models:
        results += measure(
            name, args.recipes, args.folder, args.threads, args.batch, args.seconds, product["ratio"]
        )
    if args.output is not None:
        write_results(args.output, results, ("model",), machine=surroundings(), product=product)


if __name__ == "__main__":
    main()
