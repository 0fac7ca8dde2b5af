"""Every Triton kernel compiles ahead of time for sm_80 and sm_90, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vitzoo
from vitzoo.kernels.common.backends import operators

FOLDERS = sorted(
    path.parent.name for root in vitzoo.kernels.__path__ for path in Path(root).glob("*/triton_impl.py")
)
# In a process of its own: the other tests run Triton's interpreter, which is chosen at import.
COMPILE = """
import importlib, json, sys
from vitzoo.kernels.common.triton_support import compile_ahead
module = importlib.import_module(f"vitzoo.kernels.{sys.argv[1]}.triton_impl")
found = {}
for kernel, signature, constexprs, num_warps in module.AHEAD:
    for capability in map(int, sys.argv[2:]):
        compiled = compile_ahead(kernel, signature, constexprs, capability, num_warps)
        name = f"{compiled.metadata.name} {sorted(set(signature.values()))} sm_{capability}"
        found[name] = len(compiled.asm["cubin"])
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.slow), "90"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_compiles_to_a_cubin(folder: str, capability: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    command = [sys.executable, "-c", COMPILE, folder, capability]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert {name.rsplit(" ", 1)[1] for name in sizes} == {f"sm_{capability}"}
    assert any("bf16" in name for name in sizes), f"{folder} compiles nothing in bfloat16"
    assert all(size > 500 for size in sizes.values()), sizes


def test_every_operator_with_a_triton_backend_is_compiled() -> None:
    with_triton = {o.name for o in operators.values() if any(b.name == "triton" for b in o.backends)}
    assert bool(with_triton) == bool(FOLDERS)
