"""What sdist and wheel hold: the whole package, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ("*.py", "*.toml", "*.j2", "*.js", "py.typed")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests run outside a checkout")


def _files(folder: str) -> set[str]:
    top = ROOT / folder  # walked through links: suites and kernels are links
    paths = [Path(at, name) for at, _, names in os.walk(top, followlinks=True) for name in names]
    return {p.relative_to(top).as_posix() for p in paths if any(p.match(pattern) for pattern in DATA)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    environment = {**os.environ, "VITZOO_NO_NATIVE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "is absent from the `packages` configuration" not in done.stdout + done.stderr
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    package = {f"vitzoo/{name}" for name in _files("vitzoo") if not name.startswith("kernels/")}
    kernels = {f"vitzoo/kernels/{name}" for name in _files("kernels")}
    assert len(kernels) > 100
    assert {name for name in names if not name.endswith("README.md")} == package | kernels


def test_the_sdist_holds_what_the_extensions_are_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    sources = {p for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(pattern)}
    assert {p.relative_to(ROOT).as_posix() for p in sources} <= names
    assert {f"kernels/{name}" for name in _files("kernels")} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".o", ".so"))]
