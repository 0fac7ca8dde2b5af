"""The main job on a real photograph: create, count, time, export and run one backbone of each category.

`run` prints tables and writes `demo.json`, `demo.html`, one page that needs nothing else; on request INT8 files too.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitzoo.demo.measure import Settings, measure_models
from vitzoo.export.files import scratch_folder, write_text
from vitzoo.registry import check_name

__all__ = ["MODELS", "DemoError", "run"]

# category -> the backbone that stands for it
MODELS = {
    "hierarchical": "cvt_13",
    "token-pruning": "evit_small_patch16_224",
    "hilo": "litv2_small",
    "scan": "vim_tiny_patch16_224",
    "convolutional": "mobilenetv3_large_100",
    "equivariant": "vit_small_patch16_224_poly",
}
UNTRAINED = "untrained weights: predictions mean nothing, the numbers of speed and agreement do"
SCHEMA = 1


class DemoError(RuntimeError):
    """A model of the demo could not be run; the results of the others were written."""


def run(
    out_dir: str | Path = "results",
    models: Sequence[str] | None = None,
    threads: int | None = None,
    pretrained: bool = False,
    seconds: float = 1.5,
    keep_onnx: bool = False,
    int8: bool = False,
    console: Any = None,
) -> dict[str, Any]:
    """Run the demo on scikit-learn's two photographs.

    Args:
        out_dir: folder for `demo.json` and `demo.html`; made if it does not exist.
        models: model names; one of each category if None.
        threads: CPU threads, PyTorch's number if None.
        pretrained: try to download the weights; models whose weights cannot be had run untrained, and say so.
        seconds: time spent on measuring each model, for latency and again for throughput.
        keep_onnx: leave the exported files in `out_dir`.
        int8: quantize each model on crops of the photographs and leave `<model>_int8.onnx` with its JSON file in
            `out_dir`, or `<model>_int8.float.onnx` where the gate refuses it, which is no failure.
        console: a `rich.console.Console` to print to, standard output if None.

    Returns:
        What `demo.json` holds.

    Raises:
        ImportError: a package of the demo is missing; the message has the line that installs it.
        OSError: `out_dir` cannot be made or written, found before the work starts.
        UnknownModelError: a name that no model has.
        DemoError: a model failed; the message says which and why.
    """
    _require_packages()
    from rich.console import Console

    from vitzoo.demo.page import render_page
    from vitzoo.demo.report import print_summary, tracked

    start = time.perf_counter()
    out, console = Path(out_dir), console or Console()
    names = [check_name(name) for name in (MODELS.values() if models is None else models)]
    out.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out / "demo.json"):
        pass  # an unwritable folder is found now, not after minutes
    settings = Settings(threads, pretrained, seconds, out if keep_onnx else None, out if int8 else None)
    with tracked(console) as tell:
        result, figures = measure_models(names, settings, tell)
    result = {"schema": SCHEMA, **result, "seconds": round(time.perf_counter() - start, 1)}
    write_text(out / "demo.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "demo.html", render_page(result, figures))
    print_summary(console, result, out)
    failed = [f"{row['model']}: {row['error']}" for row in result["models"] if "error" in row]
    if failed:
        raise DemoError("; ".join(failed))
    return result


def _require_packages() -> None:
    needed = {"jinja2": "jinja2", "onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"}
    needed |= {"PIL": "pillow", "sklearn": "scikit-learn"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, not installed here: pip install 'vitzoo[demo]'"
        )
