"""`vitzoo.benchmark`: rows of tiny models, sweeps, failures, interruption."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.benchmark.results import passes_of, read_results

QUICK = dict(seconds=0.02, min_rounds=3, warmup_seconds=0.02, memory=False)
TINY = dict(img_size=16, **QUICK)

# a file of its own: a child process must be able to import what it is sent
FAKES = '''
import os, signal, sys, time
import torch
from torch import nn

class Allocates(nn.Module):
    """Holds a tensor of so many MiB while it runs."""
    def __init__(self, mib, weight_mib=0):
        super().__init__()
        self.mib = mib
        self.weight = nn.Parameter(torch.ones(max(1, weight_mib * 2**18)))
    def forward(self, x):
        held = torch.ones(self.mib * 2**18)
        return x.flatten(1) * held[0]

class Dies(nn.Module):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGKILL)

class DiesInAFork(nn.Module):
    def forward(self, x):
        if "vitzoo_test_parent" not in sys.modules:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

class Notes(nn.Module):
    """Notes in which processes it runs, and sleeps as long as the number of processes before says."""
    def __init__(self, folder, fails_in=0):
        super().__init__()
        self.folder, self.fails_in = folder, fails_in
    def forward(self, x):
        if not x.is_meta:
            open(os.path.join(self.folder, str(os.getpid())), "w").close()
            processes = len(os.listdir(self.folder))
            if processes == self.fails_in:
                raise RuntimeError("fails now")
            time.sleep(0.002 * processes)
        return x

class Pid(nn.Module):
    def forward(self, x):
        if x.is_meta or os.environ.get("VITZOO_TEST_PARENT") == str(os.getpid()):
            return x
        raise RuntimeError(f"runs in {os.getpid()}, child of {os.getppid()}")
'''


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch):
    (tmp_path / "vitzoo_fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vitzoo_fakes", raising=False)
    monkeypatch.setitem(sys.modules, "vitzoo_test_parent", sys)
    return importlib.import_module("vitzoo_fakes")


class _Fails(nn.Module):
    def __init__(self, error: BaseException, largest: int = 0) -> None:
        super().__init__()
        self.error, self.largest = error, largest

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.largest:
            raise self.error
        return x


def _linear(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, width))


def test_a_row_says_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    found = vitzoo.benchmark({"mine": _linear()}, batch_size=4, threads=1, output=path, **TINY)
    (row,) = found.rows
    expected = dict(model="Sequential", label="mine", mode="infer", runtime="eager", precision="float32")
    expected |= dict(infer_batch_size=4, requested_batch_size=4, infer_img_size=16, device="cpu", threads=1)
    expected |= dict(param_count=0.006, uncounted_ops=[], backends={}, ratio=1.0, ratio_to="mine")
    expected |= dict(weight_mib=round((768 * 8 + 8) * 4 / 2**20, 3), layout="contiguous", calls_per_round=1)
    row["calls_per_round"] = 1
    assert expected.items() <= row.items()
    assert row["infer_samples_per_sec"] == pytest.approx(4e3 / row["infer_step_time"], rel=1e-4)
    assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["rounds"] == len(row["samples_s"]) >= 3
    machine = found.header["machine"]
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]
    assert machine["cpu"]["flags"]
    assert len(machine["load"]) == 3
    read = read_results(path)
    assert read.header == json.loads(json.dumps(found.header))
    assert [r["run"] for r in read.rows] == [found.header["run"]]


def test_models_of_the_zoo_say_which_kernel_ran() -> None:
    (row,) = vitzoo.benchmark("vim_tiny_patch16_224", kwargs={"depth": 1}, img_size=32, **QUICK).rows
    counted = vitzoo.count_flops(
        vitzoo.create_model("vim_tiny_patch16_224", depth=1, img_size=32), (3, 32, 32)
    )
    assert row["infer_gmacs"] == pytest.approx(counted.gmacs, abs=1e-4)
    assert row["scan_gmacs"] == pytest.approx(counted.by_kind["scan"], abs=1e-4)
    assert row["infer_gflops"] == pytest.approx(2 * row["infer_gmacs"], abs=2e-4)
    with vitzoo.kernels.use_backend("reference"):
        (forced,) = vitzoo.benchmark("vim_tiny_patch16_224", kwargs={"depth": 1}, img_size=32, **QUICK).rows
    # the reference of one operator may be built of others
    assert set(forced["backends"]) >= set(row["backends"]) != set()
    assert all(backends == ["reference"] for backends in forced["backends"].values())


def test_a_sweep_has_a_row_for_every_combination() -> None:
    found = vitzoo.benchmark(
        {"a": _linear(), "b": _linear(4)},
        batch_size=[1, 2],
        img_size=[16, (8, 32)],
        dtype=["float32", "bfloat16"],
        **QUICK,
    )
    cells = [(r["label"], r["precision"], r["infer_img_size"], r["infer_batch_size"]) for r in found.rows]
    assert cells == [
        (label, dtype, size, batch)
        for dtype in ("float32", "bfloat16")
        for size in (16, [8, 32])
        for batch in (1, 2)
        for label in "ab"
    ]
    assert found.failed == []
    weights = {r["precision"]: r["weight_mib"] for r in found.rows if r["label"] == "a"}
    assert weights["float32"] == pytest.approx(2 * weights["bfloat16"], abs=2e-3)


def test_training_has_timms_keys_and_moves_the_weights_of_a_copy() -> None:
    model = _linear()
    before = model[1].weight.clone()
    (row,) = vitzoo.benchmark(model, mode="train", batch_size=2, **TINY).rows
    assert row["train_batch_size"] == 2
    assert row["train_img_size"] == 16
    assert row["train_samples_per_sec"] == pytest.approx(2e3 / row["train_step_time"], rel=1e-4)
    assert "infer_samples_per_sec" not in row
    assert torch.equal(model[1].weight, before)


def test_channels_last_and_compiled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = vitzoo.benchmark(model, memory_format="channels_last", runtime=["eager", "compiled"], **TINY)
    assert [r["layout"] for r in found.rows] == ["channels_last"] * 2
    assert found.failed == []
    assert found.rows[1]["compile_seconds"] > 0


def test_matrix_attention_forms_the_matrix() -> None:
    from vitzoo.benchmark.case import Case
    from vitzoo.benchmark.models import build

    fused = {
        a: build(Case("deit_tiny_patch16_224", attention=a)).blocks[0].attn.fused_attn
        for a in ("default", "matrix")
    }
    assert fused == {"default": True, "matrix": False}
    assert build(Case("deit_tiny_patch16_224")).blocks[0].attn.fused_attn


@pytest.mark.parametrize("layer", ["hilo", "spatial_reduction", "local_window", "global"])
def test_layers(layer: str) -> None:
    (row,) = vitzoo.benchmark(f"layer:{layer}", kwargs={"dim": 24, "num_heads": 3}, **QUICK).rows
    assert "error" not in row
    assert row["infer_img_size"] == 14
    assert row["infer_gmacs"] > 0


def test_ratios_are_to_the_baseline(monkeypatch) -> None:
    found = vitzoo.benchmark(["layer:global"], against=[_linear(), _linear(4)], img_size=14, **QUICK)
    assert [row["label"] for row in found.rows] == ["layer:global", "Sequential #1", "Sequential #2"]
    assert "error" not in found.rows[0]
    assert all("error" in row for row in found.rows[1:])  # 14 x 14 does not fit them
    found = vitzoo.benchmark({"a": _linear()}, against=[_linear(4)], **TINY)
    assert {row["ratio_to"] for row in found.rows} == {"Sequential"}
    assert found.rows[1]["ratio"] == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no more"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError("img_size 225 is odd"), "failed"),
    ],
    ids=["python", "cuda", "cpu allocator", "size"],
)
def test_a_failing_model_is_a_row_and_the_sweep_goes_on(error: Exception, kind: str) -> None:
    models = {"bad": _Fails(error, largest=1), "good": nn.Identity()}
    found = vitzoo.benchmark(models, batch_size=[2, 1], **TINY)
    bad = found.failed
    assert [(row["label"], row["requested_batch_size"], row["error_kind"]) for row in bad] == [
        ("bad", 2, kind)
    ]
    assert str(error) in bad[0]["error"]
    assert "infer_samples_per_sec" not in bad[0]
    assert [row["label"] for row in found.rows if "error" not in row] == ["good", "bad", "good"]


@pytest.mark.parametrize("runtime", ["eager", "compiled", "openvino"])
def test_int8_without_a_quantized_path_is_refused(runtime: str) -> None:
    (row,) = vitzoo.benchmark(_linear(), dtype="int8", runtime=runtime, **TINY).rows
    assert row["error_kind"] == "unsupported"
    assert f"for runtime onnxruntime, not for runtime {runtime}" in row["error"]


def test_interrupted_it_leaves_the_finished_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    models = {"good": nn.Identity(), "stops": _Fails(KeyboardInterrupt(), largest=2)}
    with pytest.raises(KeyboardInterrupt):
        vitzoo.benchmark(models, batch_size=[1, 2, 4], output=path, **TINY)
    rows = read_results(path).rows
    assert [(row["label"], row["infer_batch_size"]) for row in rows] == [
        ("good", 1), ("stops", 1), ("good", 2), ("stops", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": -1}, "batch_size -1 is not a positive integer"),
        ({"batch_size": [1, 0]}, "batch_size 0 is not"),
        ({"img_size": (32, -1)}, "img_size -1 is not"),
        ({"threads": 0}, "threads 0 is not"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; known: float32"),
        ({"runtime": "tensorrt"}, "unknown runtime"),
        ({"mode": "both"}, "unknown mode"),
        ({"device": "tpu"}, "unknown device"),
        ({"seconds": -1}, "seconds -1 is not positive"),
        ({"passes": 0}, "passes 0 is not positive"),
        ({"models": []}, "no model to measure"),
        ({"models": "layer:mlp"}, "unknown layer 'mlp'"),
        ({"models": "vim_tiny"}, "did you mean vim_tiny_patch16_224"),
        ({"models": "timm:vit_nothing"}, "unknown model"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(kwargs: dict, message: str, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match=message):
        vitzoo.benchmark(**{"models": "vim_tiny_patch16_224", "output": output, **kwargs})
    assert not output.exists()
    with pytest.raises(FileNotFoundError, match="no such ONNX file"):
        vitzoo.benchmark("nowhere.onnx", output=output)
    assert not output.exists()


def test_peak_memory_of_known_tensors(fakes) -> None:
    models = {
        "runs": fakes.Allocates(400),
        "dies": fakes.DiesInAFork(),
        "holds": fakes.Allocates(100, weight_mib=200),
        "small": fakes.Allocates(40),
    }
    found = vitzoo.benchmark(models, **{**TINY, "memory": True})
    assert found.failed == []
    assert found.rows[0]["peak_mem_of"] == "resident set"
    peaks = {row["label"]: row["peak_mem_mib"] for row in found.rows}
    assert peaks["runs"] == pytest.approx(400, rel=0.05)
    assert peaks["holds"] == pytest.approx(300, rel=0.05)
    assert peaks["small"] == pytest.approx(40, rel=0.05)
    assert peaks["dies"] is None
    assert "killed" in found.rows[1]["peak_mem_error"]


def test_every_pass_is_in_fresh_processes(fakes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitzoo.benchmark.group.describe", lambda case: ({}, (3, 8, 8)))
    folders = {name: tmp_path / name for name in ("notes", "later", "plain")}
    for folder in folders.values():
        folder.mkdir()
    models = {
        "notes": fakes.Notes(str(folders["notes"])),
        "later": fakes.Notes(str(folders["later"]), fails_in=2),
        "plain": fakes.Notes(str(folders["plain"])),
    }
    how = {**QUICK, "seconds": 0.09, "min_rounds": 7}
    found = vitzoo.benchmark(models, img_size=8, passes=3, output=tmp_path / "r.jsonl", **how)
    notes, later, plain = read_results(tmp_path / "r.jsonl").rows
    assert "fails now" in later["error"]
    assert "samples_s" not in later
    for row in (notes, plain):
        processes = {int(path.name) for path in folders[row["label"]].iterdir()}
        assert len(processes) == 3
        assert os.getpid() not in processes
        assert row["passes"] == len(row["samples_passes"]) == 3
        assert min(row["samples_passes"]) >= 3
        assert sum(row["samples_passes"]) == len(row["samples_s"]) == row["rounds"]
        levels = [np.median(samples) for samples in passes_of(row)]
        assert levels[2] > levels[1] > levels[0] >= 0.002
    assert notes["ratio"] == notes["ratio_low"] == notes["ratio_high"] == 1
    # each pass is slower than the one before in both alike, so that the ratio stays
    assert plain["ratio"] == pytest.approx(1, rel=0.3)
    assert found.header["measure"]["passes"] == 3


def test_each_in_a_process_of_its_own(fakes, monkeypatch) -> None:
    monkeypatch.setenv("VITZOO_TEST_PARENT", str(os.getpid()))
    models = {"pid": fakes.Pid(), "dies": fakes.Dies(), "good": _linear()}
    monkeypatch.setattr("vitzoo.benchmark.group.describe", lambda case: ({}, (3, 16, 16)))
    found = vitzoo.benchmark(models, isolate=True, **{**TINY, "memory": True})
    pid, dies, good = found.rows
    assert "runs in" in pid["error"]
    assert str(os.getpid()) not in pid["error"].split()[3]
    assert pid["error_kind"] == "failed"
    assert "killed" in dies["error"]
    assert dies["error_kind"] == "out of memory"
    assert good["infer_samples_per_sec"] > 0
    assert 0 <= good["peak_mem_mib"] < 50
