"""`pytest benchmarks` times every operator and every layer, and its JSON says where."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import layer_cases
import pytest
import torch
from torch import nn

import vitzoo.layers

ROOT = Path(__file__).resolve().parents[2]


def _layers() -> set[str]:
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(vitzoo.layers.__path__, "vitzoo.layers.")
    ]
    classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    return {
        c.__name__ for c in classes if issubclass(c, nn.Module) and c.__module__.startswith("vitzoo.layers.")
    }


def test_every_layer_is_timed() -> None:
    assert _layers() <= {case.layer for case in layer_cases.cases()}


@pytest.mark.parametrize("case", [*layer_cases.cases()], ids=lambda case: f"{case.layer}-{case.label}")
def test_candidates_have_one_input_and_one_output(case: layer_cases.Case) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, *case.size[1:]) if case.layer != "scatter_tokens" else torch.randn(case.size)
    with torch.inference_mode():
        outs = [found(x) for found in case.make().values()]
    shapes = {(out[0] if isinstance(out, tuple) else out).shape for out in outs}
    assert len(shapes) == 1


def test_the_suite_runs_and_records_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    options = ["-k", "rms_norm_gated or RMSNorm", f"--benchmark-json={path}"]
    options += ["--benchmark-min-rounds=1", "--benchmark-max-time=0.01"]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not as a worker of this run
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert {"isa", "versions"} <= set(found["machine_info"]["vitzoo"])
    assert "node" not in found["machine_info"]
    timed = {
        (b["extra_info"].get("operator") or b["extra_info"]["layer"], b["extra_info"]["pass"])
        for b in found["benchmarks"]
    }
    assert timed == {
        (name, kind) for name in ("rms_norm_gated", "RMSNorm") for kind in ("forward", "forward+backward")
    }
    assert all(b["stats"]["median"] > 0 and "data" not in b["stats"] for b in found["benchmarks"])
