"""`vitzoo.quantize`: `vitzoo.quantization.api.quantize` with times of layers and files in ONNX Runtime at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, fx, nn

from vitzoo.benchmark.machine import this_machine
from vitzoo.deploy.times import file_speeds, layer_times
from vitzoo.export import export_onnx
from vitzoo.export.quantized import check_target, for_target
from vitzoo.quantization import api
from vitzoo.quantization.config import Recipe, load_recipe
from vitzoo.quantization.graph import Site
from vitzoo.quantization.model import QuantizedModel

# u8 x u8 takes this many times as long as u8 x s8 of seven bits with AVX2 (ONNX Runtime, M 1576, K 384, N 1536, one
# thread: 1.46 and 2.07 times as fast as float); elsewhere both take the same time, which says nothing of AVX2
U8_ON_AVX2 = 2.07 / 1.46


def quantize(
    model: nn.Module,
    recipe: Recipe | str = "auto",
    calibration_batches: Iterable[Tensor] = (),
    filter_fn: Callable[[Site], bool] | None = None,
    progress: Callable[[str], None] | None = None,
    measure_layers: bool = False,
    target: str | None = None,
    threads: int | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe.

    A recipe whose activations are "auto" has each layer timed in ONNX Runtime, on this machine, in floating point and
    in each way of quantizing it that the target runs, and then whole files beside the float file: what is chosen is
    faster than float, or it is float, and `why_float` of the result says so.

    Args:
        model: a trained model, float32, on the CPU; it is not changed.
        recipe: see `vitzoo.quantization.config.Recipe`, or the name of one of the package.
        calibration_batches: images as the model takes them, (B, C, H, W), all of one size; 32 to 300 images in all.
        filter_fn: which sites may be quantized; default all.
        progress: called with a few words at the start of each step.
        measure_layers: measure the logit error of each layer alone also where no error budget asks.
        target: who will run it, see `vitzoo.export.quantized.TARGETS`; this machine if None. With "x86-avx2" weights of
            "auto" have seven bits, or all of uint8 where the budget asks for that; for "tensorrt" every recipe
            that runs as integers is symmetric and "auto" static, see `vitzoo.export.quantized.for_target`.
        threads: threads to time layers with, PyTorch's number if None.

    Returns:
        A new model; layers that the recipe's error budget forbids stay in floating point and say so.

    Raises:
        ImportError: "auto" without the ONNX packages; the message has the line that installs them.
        ValueError: no images, images of several sizes, an unknown recipe or target, a recipe that the target cannot
            run, or one that finds nothing to quantize.
    """
    goal = target or this_machine()
    check_target(goal)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if chosen.activations == "auto" or goal == "tensorrt":
        chosen = for_target(chosen, goal)
    slower = U8_ON_AVX2 if goal == "x86-avx2" and this_machine() != goal else 1.0

    def clock(
        module: fx.GraphModule, sites: Sequence[Site], x: Tensor, modes: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Mapping[str, float]]:
        times = layer_times(module, sites, x, modes, threads)
        return {
            name: {mode: ms * (slower if mode.endswith(" u8") else 1.0) for mode, ms in found.items()}
            for name, found in times.items()
        }

    batches = list(calibration_batches)
    if chosen.activations != "auto":
        return api.quantize(model, chosen, batches, filter_fn, progress, measure_layers)
    with tempfile.TemporaryDirectory() as folder:
        floating = Path(folder, "float.onnx")

        def race(candidates: Sequence[QuantizedModel]) -> Sequence[float]:
            if not floating.exists():
                export_onnx(model, floating, input_size=batches[0].shape[1:], check=False)
            return file_speeds(floating, candidates, model, batches[0], goal, threads)

        return api.quantize(model, chosen, batches, filter_fn, progress, measure_layers, clock, race)
