"""Numbers of an exported file beside those of eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitzoo.testing import relative_difference

# nodes whose integers turn on the last bit: equal scores may be ordered either way
DISCONTINUOUS = ("TopK", "ArgMax", "ArgMin")


def open_session(
    path: str | Path,
    threads: int | None = None,
    optimized: str | Path | None = None,
    profile: str | Path | None = None,
    as_written: bool = False,
) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: the file.
        threads: threads inside an operator, PyTorch's number if None.
        optimized: where to write the graph as it will be run.
        profile: beginning of the name of the file for the times of each node; the session's `end_profiling` gives it.
        as_written: run every node of the file by itself, so that products between Q and DQ nodes are of floats.

    Returns:
        An `onnxruntime.InferenceSession`.
    """
    import onnxruntime

    options = session_options(threads)
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_options(threads: int | None = None) -> Any:
    """Return options of an ONNX Runtime session with so many threads inside an operator, PyTorch's number if None.

    Threads sleep between calls: those that spin for the next one take the cores from the other file of a comparison.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def run_session(session: Any, x: Tensor) -> list[Tensor]:
    """Run an ONNX Runtime session on images (B, C, H, W), float32; returns its outputs on the CPU."""
    outputs = session.run(None, {session.get_inputs()[0].name: x.detach().cpu().contiguous().numpy()})
    return [torch.from_numpy(out) for out in outputs]


def time_session(session: Any, x: Tensor, repeats: int = 20, budget_s: float = 2.0) -> list[float]:
    """Return the seconds that single runs of a session take.

    Args:
        session: from `open_session`.
        x: images, (B, C, H, W), float32.
        repeats: runs at most, after one that is not counted.
        budget_s: seconds after which no further run starts; three are always made.
    """
    feed = {session.get_inputs()[0].name: x.detach().cpu().contiguous().numpy()}
    session.run(None, feed)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - start < budget_s):
        begin = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - begin)
    return times


def outputs_difference(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the largest norm(out - ref) / norm(ref) over pairs of outputs.

    Raises:
        AssertionError: another number of outputs, or another number of values in one.
    """
    if len(outputs) != len(reference):
        raise AssertionError(f"{len(outputs)} outputs compared with {len(reference)}")
    return max(relative_difference(out, ref) for out, ref in zip(outputs, reference, strict=True))


def largest_difference(
    run: Callable[[Tensor], list[Tensor]],
    eager: Callable[[Tensor], list[Tensor]],
    make_input: Callable[[int, int], Tensor],
    batches: Sequence[int],
    tolerance: float,
    draws: int = 1,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Compare an exported file with eager PyTorch over several batch sizes.

    Args:
        run: gives the outputs of the file.
        eager: gives the outputs of the model.
        make_input: (batch, seed) -> images (batch, C, H, W).
        batches: batch sizes.
        tolerance: relative difference that counts as agreement.
        draws: inputs tried for a batch size until one agrees. More than one suits graphs with a
            `DISCONTINUOUS` node, where a tie between scores may fall either way on one image; a wrong graph
            disagrees on every image.
        progress: told which batch is being run.

    Returns:
        The largest difference found, of each batch size the draw that agreed best.
    """
    worst = 0.0
    for batch in batches:
        if progress:
            progress(f"compare with eager at batch {batch}")
        best = float("inf")
        for seed in range(draws):
            x = make_input(batch, seed)
            difference = outputs_difference(run(x), eager(x))
            # a difference that is not a number is never the best one
            best = difference if difference < best else best
            if best <= tolerance:
                break
        worst = max(worst, best)
    return worst
