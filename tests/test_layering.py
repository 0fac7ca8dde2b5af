"""Imports go downwards only; see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import modules of a lower rank, and of its own package. Leaves import nothing of vitzoo.
RANKS = {
    "__init__": 9,
    "__main__": 9,
    "cli": 8,
    "demo": 7,
    "doctor": 7,
    "deploy": 7,
    "quantization": 6,
    "export": 6,
    "benchmark": 6,
    "factory": 5,
    "models": 4,
    "layers": 3,
    "kernels": 2,
    "_C": 1,
    "registry": 0,
    "checkpoint": 0,
    "testing": 0,
    "stack": 0,
    "_version": 0,
}
SIDEWAYS = {("export", "quantization"), ("benchmark", "export"), ("demo", "deploy")}


def _sources() -> list[Path]:
    ours = [
        p for p in (ROOT / "vitzoo").rglob("*.py") if "kernels" not in p.relative_to(ROOT / "vitzoo").parts
    ]
    return sorted(ours) + sorted((ROOT / "kernels").rglob("*.py"))


def _place(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1:] if parts[0] == "vitzoo" else parts


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            if node.module in ("vitzoo", "vitzoo.models"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def complaints(path: Path, place: tuple[str, ...], imports: list[str]) -> list[str]:
    own = place[0]
    wrong = []
    for name in imports:
        parts = name.split(".")
        if parts[0] == "kernels":
            wrong.append(f"{path}: imports `{name}`; say vitzoo.kernels")
        if parts[0] != "vitzoo" or len(parts) < 2 or parts[1] not in RANKS:
            continue
        target = parts[1]
        if target == own:
            if own == "kernels" and len(parts) > 3 and parts[2] not in (place[1], "common"):
                wrong.append(f"{path}: imports the internals {name} of another operator")
            if own == "models" and len(parts) > 2 and not parts[2].startswith("_") and place[1] != "__init__":
                wrong.append(f"{path}: imports another family, {name}; what two share moves to layers/")
        elif RANKS[target] >= RANKS[own] and (own, target) not in SIDEWAYS:
            wrong.append(f"{path}: {own} imports upwards or sideways: {name}")
    return wrong


def test_imports_go_downwards() -> None:
    sources = _sources()
    assert len(sources) > 15
    assert [c for p in sources for c in complaints(p.relative_to(ROOT), _place(p), _imports(p))] == []


def test_every_module_has_a_rank() -> None:
    assert {_place(p)[0] for p in _sources()} <= set(RANKS)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("registry",), "vitzoo.models"),
        (("layers", "x"), "vitzoo.models.evit"),
        (("models", "evit"), "vitzoo.models.vim"),
        (("kernels", "a", "op"), "vitzoo.kernels.b.op"),
        (("export", "onnx"), "vitzoo.benchmark.flops"),
        (("layers", "x"), "kernels.selective_scan"),
    ],
    ids=lambda v: v if isinstance(v, str) else "/".join(v),
)
def test_upward_imports_are_found(place: tuple[str, ...], name: str) -> None:
    assert len(complaints(Path("x.py"), place, [name])) == 1


def test_kernels_stays_a_namespace_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
