"""Importing vitzoo is light, and the names of the public face are there."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "sklearn",
    "matplotlib",
    "rich",
    "typer",
    "jinja2",
    "plotly",
    "textalloc",
)


def _modules_after(code: str) -> dict:
    report = "import json, sys, torch; print(json.dumps({'modules': sorted(sys.modules), "
    report += "'cuda': torch.cuda.is_initialized()}))"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy() -> None:
    # timm itself loads Triton through torch._dynamo: what counts is what vitzoo adds to it
    before = set(_modules_after("import timm")["modules"])
    after = _modules_after("import vitzoo")
    added = {m.split(".")[0] for m in set(after["modules"]) - before}
    assert added.isdisjoint(HEAVY)
    assert not after["cuda"]


def test_every_model_is_registered_with_timm() -> None:
    import timm

    import vitzoo

    ours = [m for f in vitzoo.registry.families() if f.origin == "vitzoo" for m in f.models]
    assert len(ours) >= 20
    assert all(timm.is_model(name) for name in ours)


def test_no_model_of_timm_is_overwritten() -> None:
    import timm

    import vitzoo

    for family in vitzoo.registry.families():
        for name in family.models:
            module = timm.models.model_entrypoint(name).__module__
            assert module.startswith("vitzoo.models." if family.origin == "vitzoo" else "timm.models."), name


@pytest.mark.parametrize(
    "name", ["benchmark", "create_model", "list_models", "model_info", "count_flops", "export_onnx"]
)
def test_public_functions(name: str) -> None:
    import vitzoo

    assert callable(getattr(vitzoo, name))


def test_operators_are_functions_of_vitzoo_kernels() -> None:
    import vitzoo

    assert callable(vitzoo.kernels.selective_scan)
    assert callable(vitzoo.kernels.use_backend)
    # a later import of the operator's folder must not put the module in the function's place
    from vitzoo.kernels.selective_scan import reference  # noqa: F401

    assert callable(vitzoo.kernels.selective_scan)
