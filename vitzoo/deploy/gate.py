"""The gate: a quantized file is handed over only if the runtime runs it in integers, faster, and near the float model.

The policy is ModelOpt's: below a threshold the float file is kept instead.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.benchmark.machine import machine, this_machine
from vitzoo.benchmark.timing import Timing, compare
from vitzoo.deploy.formats import NOTES_SUFFIX, Format, belonging, check_notes, format_of, has_whole_range
from vitzoo.export.check import open_session, run_session
from vitzoo.export.common import Run, silent
from vitzoo.export.files import publish, scratch_folder
from vitzoo.export.notes import hashes, notes, write_notes
from vitzoo.export.quantized import OPSET, check_target, check_zero_points
from vitzoo.quantization.model import QuantizedModel

RUN_BATCHES = (1, 3, 8)
SECONDS = 3.0  # that each file is timed for


@dataclass(frozen=True)
class Thresholds:
    """What a quantized file has to reach.

    Attributes:
        coverage: least share of multiply-accumulates in integer kernels.
        speed: least speed relative to the float file in the same runtime.
        error: largest relative error of the logits on held-back images; None asks for none.

    Raises:
        ValueError: a number that no file can have.
    """

    coverage: float = 0.9
    speed: float = 1.02
    error: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"coverage is {self.coverage}, expected 0 to 1")
        if self.speed < 0:
            raise ValueError(f"speed is {self.speed}, expected a ratio of 0 or more")
        if self.error is not None and not self.error > 0:
            raise ValueError(f"error is {self.error}, expected a positive relative error")


@dataclass(frozen=True)
class Gate:
    """What was found when a quantized file was run.

    Attributes:
        coverage: share of multiply-accumulates in integer kernels of the graph that the runtime ran; for "tensorrt",
            which is not run, of those whose factors are quantized, of all that ONNX Runtime counts in the float file.
        floating: largest products left in floating point, name -> share of all multiply-accumulates.
        speed: images a second relative to the float file, in the same runtime on this machine, whatever the target,
            rounds interleaved; None for "tensorrt".
        float_ms: median time of a batch of the float file, ms; None for "tensorrt".
        int8_ms: median time of a batch of the quantized file, ms; None for "tensorrt".
        batch_size: images in that batch.
        threads: threads of the runtime.
        logit_error: norm(int8 - float) / norm(float) of the logits on the held-back images.
        top1_agreement: share of those images on which both name the same class.
        simulation_error: norm(int8 - simulated) / norm(float): what rounding that falls the other way makes of equal
            scales.
        images: held-back images compared.
    """

    coverage: float
    floating: dict[str, float]
    speed: float | None
    float_ms: float | None
    int8_ms: float | None
    batch_size: int
    threads: int
    logit_error: float
    top1_agreement: float
    simulation_error: float
    images: int

    def complaints(self, thresholds: Thresholds) -> list[str]:
        """Return a sentence for each threshold that is missed."""
        found = []
        if self.coverage < thresholds.coverage:
            left = ", ".join(f"{name} {share:.1%}" for name, share in [*self.floating.items()][:3])
            found.append(
                f"integer coverage is {self.coverage:.3f}, below {thresholds.coverage} (in float: {left})"
            )
        if self.speed is not None and self.speed < thresholds.speed:
            found.append(f"speed is {self.speed:.3f} of the float file's, below {thresholds.speed}")
        if thresholds.error is not None and self.logit_error > thresholds.error:
            found.append(f"relative logit error is {self.logit_error:.4f}, above {thresholds.error}")
        return found


class GateError(RuntimeError):
    """A quantized file missed a threshold; the float file was kept in its place.

    Attributes:
        gate: what was found.
        float_path: the file that was kept.
    """

    def __init__(self, message: str, gate: Gate, float_path: Path) -> None:
        super().__init__(message)
        self.gate, self.float_path = gate, float_path


def format_for(path: str | os.PathLike[str] | None, target: str) -> Format:
    """Return the format of a file's suffix, ONNX without one, for a target that reads it.

    Raises:
        ValueError: an unknown target, a suffix that no format has, or one that the target does not read.
    """
    check_target(target)
    kind = format_of(path)
    if target == "tensorrt" and kind.name != "onnx":
        name = Path(str(path))
        raise ValueError(f"TensorRT reads ONNX files: name it {name.stem}.onnx, not {name.name}")
    return kind


def export_quantized(
    model: nn.Module,
    quantized: QuantizedModel,
    path: str | os.PathLike[str],
    held_back: Tensor,
    target: str,
    thresholds: Thresholds | None = None,
    threads: int | None = None,
    batch_size: int = 8,
    opset: int = OPSET,
    progress: Callable[[str], None] | None = None,
    float_file: str | os.PathLike[str] | None = None,
) -> Gate:
    """Write a quantized model as a file, if the gate lets it pass, with a JSON file of the same stem beside it.

    The suffix says the format and with it the runtime of the gate: `.onnx` (ONNX Runtime), `.pt2` (a torch.export
    archive of `convert_int8`, run by PyTorch) or `.xml` (OpenVINO). All files are written under other names and renamed
    when everything has been checked. TensorRT is not run: for that target ONNX Runtime runs the file as it is written
    to compare logits, coverage is what the file asks for, and there is no speed.

    Args:
        model: the float model, on the CPU.
        quantized: made from it by `quantize`.
        path: the file, `*.onnx`, `*.pt2` or `*.xml`.
        held_back: images that were not calibrated on, (B, C, H, W), as the model takes them.
        target: see `vitzoo.export.quantized.TARGETS`.
        thresholds: what the file has to reach; the default asks for coverage 0.9 and speed 1.02.
        threads: threads of the runtime, PyTorch's number if None.
        batch_size: of the timing.
        opset: ONNX operator set.
        progress: called with a few words at the start of each step.
        float_file: the float model's ONNX file where `export_onnx` has already written one, which is then not written
            anew but copied.

    Returns:
        What was found.

    Raises:
        GateError: a threshold was missed; `<stem>.float.onnx`, or what the suffix is, was written instead.
        ImportError: a package is missing; the message has the line that installs it.
        OSError: the folder does not exist or cannot be written, or the JSON file is another file's.
        ValueError: no images, a suffix that no format has or the target does not read, a target that is unknown or
            cannot be checked here, or a recipe that is simulated only or not for the target.
    """
    here = this_machine()
    destination = Path(path)
    kind = format_for(destination, target)
    saturates = kind.name != "torch-export" and has_whole_range(quantized)  # our kernels never do
    if here == "x86-avx2" and target in ("x86-vnni", "arm") and saturates:
        raise ValueError(
            f"a file for {target} cannot be checked on this machine, {here}: it saturates sums of full-range 8-bit "
            f"products. Take target {here} or a recipe with reduce_range, or run this on a machine of the target"
        )
    check_zero_points(quantized, target)
    if len(held_back) == 0:
        raise ValueError("there are no held-back images to compare on")
    if float_file is not None and (kind.suffix != ".onnx" or belonging(Path(float_file))):
        raise ValueError("float_file takes the place of a single ONNX file only, leave it out")
    tell, thresholds = progress or silent, thresholds or Thresholds()
    with scratch_folder(destination) as folder:
        check_notes(destination)
        written, floating = folder / destination.name, folder / f"{destination.stem}.float{kind.suffix}"
        if float_file is None:
            tell("export the float model")
            kind.write(model, floating, quantized.input_size, opset, True, None, False)
        else:
            shutil.copyfile(float_file, floating)
        baseline = {*folder.iterdir()}
        tell("export the quantized model")
        nodes = kind.write_int8(quantized, written, model, target, opset)
        gate = _measure(
            kind, model, quantized, floating, written, held_back, target, threads, batch_size, tell
        )
        complaints = gate.complaints(thresholds)
        if complaints:
            complaints = [*filter(None, [quantized.why_float]), *complaints]
            for file in {*folder.iterdir()} - baseline:
                file.unlink()
            kept = destination.with_name(floating.name)
            publish(folder, kept)
            raise GateError(f"{'; '.join(complaints)}. Kept the float file {kept}", gate, kept)
        for file in baseline:
            file.unlink()
        facts = _facts(kind, model, quantized, written, target, gate, nodes, opset)
        write_notes(written.with_suffix(NOTES_SUFFIX), facts)
        publish(folder, destination)
    return gate


def _measure(
    kind: Format,
    model: nn.Module,
    quantized: QuantizedModel,
    floating: Path,
    written: Path,
    held_back: Tensor,
    target: str,
    threads: int | None,
    batch_size: int,
    tell: Callable[[str], None],
) -> Gate:
    runs_here = target != "tensorrt"
    threads = threads or torch.get_num_threads()
    tell("count what runs in integers")
    if runs_here:
        coverage = kind.coverage(written, held_back[:1])
        share = coverage.share
        left = {name: macs / coverage.total_macs for name, macs in coverage.floating.items()}
        run = kind.open(written, threads)
    else:
        total = kind.coverage(floating, held_back[:1]).total_macs
        macs = {site.name: site.macs for site in quantized.sites}
        share = sum(macs[name] for name in quantized.plans) / total
        unquantized = sorted(macs.keys() - quantized.plans.keys(), key=lambda name: -macs[name])
        left = {name: macs[name] / total for name in unquantized}
        run = functools.partial(run_session, open_session(written, threads, as_written=True))
    runs = {"float": kind.open(floating, threads), "int8": run}
    tell("compare with the float model")
    outputs = {name: _logits(run, held_back) for name, run in runs.items()}
    simulation = kind.simulation(quantized)
    with torch.no_grad():
        simulated = torch.cat([simulation(x) for x in held_back.split(batch_size)])
    size = outputs["float"].norm()
    for batch in RUN_BATCHES:
        runs["int8"](held_back[:1].expand(batch, -1, -1, -1))
    times: dict[str, Timing] = {}
    if runs_here:
        tell("time both files")
        x = held_back[torch.arange(batch_size) % len(held_back)]
        times = compare(
            {name: functools.partial(run, x) for name, run in runs.items()},
            seconds=SECONDS,
            images=batch_size,
            threads=threads,
        )
    return Gate(
        coverage=share,
        floating=left,
        speed=times["int8"].ratio_to(times["float"]) if times else None,
        float_ms=1e3 * times["float"].median if times else None,
        int8_ms=1e3 * times["int8"].median if times else None,
        batch_size=batch_size,
        threads=threads,
        logit_error=float((outputs["int8"] - outputs["float"]).norm() / size),
        top1_agreement=float((outputs["int8"].argmax(1) == outputs["float"].argmax(1)).float().mean()),
        simulation_error=float((outputs["int8"] - simulated).norm() / size),
        images=len(held_back),
    )


def _logits(run: Run, images: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([run(x)[0] for x in images.split(batch)])


def _facts(
    kind: Format,
    model: nn.Module,
    quantized: QuantizedModel,
    file: Path,
    target: str,
    gate: Gate,
    nodes: dict[str, int],
    opset: int,
) -> dict[str, Any]:
    """Return what stands in the JSON file beside a quantized file."""
    return {
        "format": kind.name,
        **hashes(file, belonging(file)),
        **notes(model, quantized.input_size, {0: "batch"}, ["logits"]),
        "opset": opset if kind.has_opset else None,
        "nodes": nodes,
        "integer_coverage": gate.coverage,
        "parity": {
            "runtime": kind.runtime,
            "logit_error": gate.logit_error,
            "top1_agreement": gate.top1_agreement,
            "simulation_error": gate.simulation_error,
            "images": gate.images,
        },
        "target": target,
        "recipe": dataclasses.asdict(quantized.recipe),
        "layers": [dataclasses.asdict(layer) for layer in quantized.layers],
        "gate": dataclasses.asdict(gate),
        "machine": machine(),
    }
