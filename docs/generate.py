"""Write docs/models.md and docs/flops.md (`make docs`); tests/test_docs.py fails when a page is out of date.

The counts on docs/flops.md are those that benchmarks/flops_audit.py last wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import vitzoo

AUDIT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "flops_audit.json"
EXPLAINED_FROM = 0.02  # differences are explained from here

HEAD = """# Models

Made by `make docs` from the registry: `vitzoo info MODEL` prints the same and more. GMACs and top-1 are the
authors' figures (papers call multiply-accumulates FLOPs), parameters are counted; a dash means that none was
published.

"""


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join("-" if c in (None, "") else str(c) for c in cells) + " |\n"


def _family(family: vitzoo.registry.Family) -> str:
    text = f"## {family.name}\n\n{family.paper}. Code: {family.code} ({family.code_license}); weights: "
    text += f"{family.weights_license}. Categories: {', '.join(family.categories)}.\n\n"
    text += _row(["model", "params", "GMACs", "top-1", "source"]) + "| --- | ---: | ---: | ---: | --- |\n"
    for name, figures in family.models.items():
        params = f"{figures.params:,}" if figures.params else None
        text += _row([f"`{name}`", params, figures.gmacs, figures.top1, figures.source])
    rows = [c for name in family.models for c in vitzoo.model_info(name).checkpoints]
    if family.origin == "vitzoo" and rows:
        text += "\n" + _row(["checkpoint", "sets", "GMACs", "top-1", "file"])
        text += "| --- | --- | ---: | ---: | --- |\n"
        for c in rows:
            sets = ", ".join(f"{k}={v}" for k, v in c.args.items())
            text += _row([f"`{c.name}`", sets, c.gmacs, c.top1, c.url or f"by hand: {c.get}"])
    return text + "\n"


def models() -> str:
    """Return the text of docs/models.md."""
    families = vitzoo.registry.families()
    ours = "".join(_family(f) for f in families if f.origin == "vitzoo")
    text = HEAD + ours + "# By reference\n\nFamilies that timm has, in the zoo's categories.\n\n"
    text += _row(["family", "categories", "models", "paper"]) + "| --- | --- | --- | --- |\n"
    for f in families:
        if f.origin == "timm":
            names = [*f.models]
            text += _row([f.name, ", ".join(f.categories), f"{len(names)}: `{names[0]}` ...", f.paper])
    return text


FLOPS = """# FLOPs

Made by `make docs` from what `benchmarks/flops_audit.py` counted. `vitzoo.count_flops(model)` and
`vitzoo flops MODEL` count one forward pass in eval mode.

- **Units.** A MAC is one multiply-accumulate. `gmacs` is what papers and timm print, often under the name FLOPs;
  `gflops` is twice that, always.
- **Counted**, by kind: `matmul` (a product with a weight), `integer matmul` (of 8-bit codes), `attention` (a product
  of two activations: fused attention and plain products give the same number), `conv`, `deformable conv`, `scan`.
- **Nothing by convention**, as in the published tables: biases, activations, softmax, norms, pooling, residual
  sums, copies, gathers, top-k and sorting, interpolation. Sampling at fractional places belongs to the last, so a
  deformable convolution counts as the convolution of its size. Fusing pruned tokens is a product of scores and tokens
  and counts.
- **Scans.** `exact` counts the sequential recurrence: 7 FLOPs a state and token, and the terms of each token (see
  the README of `kernels/selective_scan`), halved for GMACs. `paper` adds 9*B*L*D*N (and B*L*D for each of skip
  and gate) to the MACs, as Mamba papers do, though that figure is in FLOPs.
- **Uncounted.** An operator that ran, has no formula and is not in the list above is named in `uncounted_ops`;
  `vitzoo flops` then warns. It is empty for every model below.

## Beside other counters

GMACs of one image on real CPU tensors; `flop_counter` is `torch.utils.flop_counter`, halved. Each figure has its
difference from ours beside it, and where that exceeds 2%, in brackets, the operators that make it. Measured with
{versions}.

- `flop_counter` knows no formula for attention as it runs on the CPU. Our operators bring theirs, which it uses.
- fvcore follows a trace, in which it sees neither fused attention nor our operators nor torchvision's deformable
  convolution; it counts operations of norms (5 an element of LayerNorm, 2 of BatchNorm), pooling and resampling as if
  they were MACs.

Ours is exact; a published figure is rounded as its authors print it. ViTamin's are what fvcore counts.

"""

SCANS = """
## Scans in the papers' convention

GMACs with the recurrence counted as it runs, and as Mamba papers count it.

"""
# operator -> what the page calls it
CALLED = {"aten::_scaled_dot_product_flash_attention_for_cpu": "fused attention"}


def flops() -> str:
    """Return the text of docs/flops.md.

    Raises:
        ValueError: a figure was published that differs by more than 2% from ours and is not what fvcore counts.
    """
    found = json.loads(AUDIT.read_text())
    versions = found["machine"]["versions"]
    text = FLOPS.format(
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "fvcore"))
    )
    text += _row(["model or checkpoint", "input", "ours", "`flop_counter`", "fvcore", "published"])
    text += "| --- | ---: | ---: | --- | --- | --- |\n"
    for row in found["rows"]:
        counters = [_counted(row, tool) for tool in ("torch", "fvcore")]
        text += _row([f"`{row['model']}`", _side(row), f"{row['gmacs']:.3f}", *counters, _published(row)])
    text += (
        SCANS + _row(["model", "input", "scan", "exact", "paper"]) + "| --- | ---: | ---: | ---: | ---: |\n"
    )
    for row in found["rows"]:
        if "paper_gmacs" in row:
            figures = (row["by_kind"]["scan"], row["gmacs"], row["paper_gmacs"])
            text += _row([f"`{row['model']}`", _side(row), *(f"{figure:.3f}" for figure in figures)])
    return text


def _side(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["input_size"][1:]))


def _differing(row: Mapping[str, Any], figure: float, printed: str, why: str) -> str:
    """Return a figure, its difference from ours, and why where that is large."""
    off = figure / row["gmacs"] - 1
    shown = f"{printed} {round(off, 3) + 0.0:+.1%}"
    return f"{shown} ({why})" if abs(off) > EXPLAINED_FROM else shown


def _counted(row: Mapping[str, Any], tool: str) -> str:
    named = sorted(row[f"{tool}_terms"].items(), key=lambda term: -abs(term[1]))
    terms = [f"{CALLED.get(op, f'`{op}`')} {n:+.3f}" for op, n in named if abs(n) >= 5e-4]
    figure = row[f"{tool}_gmacs"]
    return _differing(row, figure, f"{figure:.3f}", ", ".join(terms))


def _published(row: Mapping[str, Any]) -> str | None:
    model, _, tag = row["model"].partition(".")
    figure = vitzoo.registry.tag_info(row["model"]).gmacs if tag else vitzoo.model_info(model).gmacs
    if figure is None:
        return None
    digits = len(str(figure).partition(".")[2])
    far = abs(figure / row["gmacs"] - 1) > EXPLAINED_FROM
    if far and round(row["fvcore_gmacs"], digits) != figure:
        raise ValueError(f"{row['model']}: {row['gmacs']} GMACs, published {figure}, for no known reason")
    return _differing(row, figure, str(figure), "fvcore's count")


if __name__ == "__main__":
    for page, text in (("models.md", models()), ("flops.md", flops())):
        Path(__file__).with_name(page).write_text(text)
