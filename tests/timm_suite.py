"""Run timm's own tests/test_models.py on every model of ours (`make test-timm`, `ALL=1` for every variant).

The tests come with timm's source distribution, which pip downloads at the version installed here. They list
models at import time, so this file is also a pytest plugin, given by `-p`: it makes `list_models` list ours.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm

import vitzoo

# Token models, in timm's sense: forward_features gives tokens. timm lists its own ViTs and Twins likewise.
TOKEN_MODELS = ("vim_*", "evit_*", "cvt_*")

# (test, model pattern, reason). Everything else must pass.
_SCRIPT = "torch.jit.script is deprecated since torch 2.11; it refuses Final and tensor-subclass annotations"
_DENSE = "the tag makes a feature extractor, which has no classifier"
LEFT_OUT = (
    ("test_model_forward_torchscript", "*", _SCRIPT),
    ("test_model_forward_fx_torchscript", "*", _SCRIPT),
    ("test_model_default_cfgs", "litv2_*_ade20k", _DENSE),
    ("test_model_default_cfgs", "litv2_*_coco", _DENSE),
    ("test_model_load_pretrained", "*", "downloads weights"),
    ("test_model_features_pretrained", "*", "downloads weights"),
)

ONE_A_FAMILY = (
    "litv2_small",
    "evit_tiny_patch16_224",
    "vim_tiny_patch16_224",
    "cvt_13",
    "twins_svt_small_poly",
    "vit_small_patch16_224_poly",
)


def _ours() -> set[str]:
    return {m for f in vitzoo.registry.families() if f.origin == "vitzoo" for m in f.models}


def _chosen() -> set[str]:
    names = os.environ.get("VITZOO_TIMM_SUITE", "")
    return set(names.split(",")) if names else _ours()


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else list(value)


_timm_list_models = timm.list_models


def list_models(filter: Any = "", module: Any = "", exclude_filters: Any = "", **kwargs: Any) -> list[str]:
    """Answer as timm.list_models would if only our models were registered."""
    filters, excluded = _as_list(filter), _as_list(exclude_filters)
    # timm's list of non-standard models is recognised by one of its entries
    if "naflexvit*" in filters:
        filters += TOKEN_MODELS
    if "naflexvit*" in excluded:
        excluded += TOKEN_MODELS
    found = _timm_list_models(filters or "", exclude_filters=excluded or "", **kwargs)
    return [name for name in found if name.split(".")[0] in _chosen()]


for _place in (timm, timm.models, timm.models._registry):
    _place.list_models = list_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that take one of our models; leave out what `LEFT_OUT` names."""
    kept, dropped = [], []
    for item in items:
        spec = getattr(item, "callspec", None)
        model = str(spec.params.get("model_name", "")) if spec else ""
        test = item.name.split("[")[0]
        left_out = any(test == t and fnmatch.fnmatch(model, m) for t, m, _ in LEFT_OUT)
        (kept if model.split(".")[0] in _chosen() and not left_out else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_report_header() -> list[str]:
    """Say what is left out and why."""
    return [f"left out: {test} of {model}: {reason}" for test, model, reason in LEFT_OUT]


def _timm_source(folder: Path) -> Path:
    """Download timm's source distribution at the installed version and unpack its tests."""
    name = f"timm-{timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "timm", "-d", str(folder), f"timm=={timm.__version__}"]
    subprocess.run(command, check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"{name}/tests/")]
        archive.extractall(folder, members=members, filter="data")
    return folder / name


def main() -> int:
    """Run the suite; exit with pytest's code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every variant rather than one a family")
    parser.add_argument(
        "--source", type=Path, help="an unpacked source distribution of timm, to download none"
    )
    parser.add_argument("-n", "--workers", default="2", help="pytest-xdist workers")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or _timm_source(Path(folder))
        here = Path(__file__).resolve().parent
        env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]))
        env["VITZOO_TIMM_SUITE"] = "" if args.all else ",".join(ONE_A_FAMILY)
        env.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "-q"]
        command += ["-n", args.workers, *rest, "tests/test_models.py"]
        return subprocess.run(command, cwd=source, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
