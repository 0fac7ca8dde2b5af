"""Write docs/models.md and docs/flops.md (`make docs`); tests/test_docs.py fails when a page is out of date."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import timm
import torch

import vitzoo

HEAD = """# Models

Made by `make docs` from the registry: `vitzoo info MODEL` prints the same and more. GMACs and top-1 are the
authors' figures (papers call multiply-accumulates FLOPs), parameters are counted; a dash means that none was
published.

"""

# family -> why its authors' figures differ from ours by more than 2%
WHY = {
    "vitamin": "published without the two products of attention; ours less its `attention` kind is within 0.2%",
}


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

Made by `make docs`. `vitzoo.count_flops(model)` and `vitzoo flops MODEL` count one forward pass in eval mode.

- **Units.** A MAC is one multiply-accumulate. `gmacs` is what papers and timm print, often under the name FLOPs;
  `gflops` is twice that, always.
- **Counted**, by kind: `matmul` (a product with a weight), `attention` (a product of two activations: fused
  attention and plain products give the same number), `conv`, `deformable conv`, `scan`.
- **Nothing by convention**, as in the published tables: biases, activations, softmax, norms, pooling, residual
  sums, copies, gathers, top-k and sorting, interpolation. Sampling at fractional places belongs to the last, so a
  deformable convolution counts as the convolution of its size.
- **Scans.** `exact` counts the sequential recurrence: 7 FLOPs a state and token, and the terms of each token (see
  the README of `kernels/selective_scan`), halved for GMACs. `paper` adds 9*B*L*D*N (and B*L*D for each of skip
  and gate) to the MACs, as Mamba papers do, though that figure is in FLOPs.
- **Uncounted.** An operator that ran, has no formula and is not in the list above is named in `uncounted_ops`;
  `vitzoo flops` then warns. It is empty for every model below.
- **Other tools** on a CPU: `torch.utils.flop_counter` of torch 2.14 counts fused attention as zero (DeiT-Tiny
  1.075 instead of 1.254 GMACs); fvcore does not see it either and adds five operations an element for LayerNorm.
  A test sets all three side by side.

Ours is exact; a published figure is rounded as its authors print it.

"""


def _gmacs(name: str) -> float:
    with torch.device("meta"):
        model = vitzoo.create_model(name)
    count = vitzoo.count_flops(model, timm.get_pretrained_cfg(name).input_size)
    assert not count.uncounted_ops, name
    return count.gmacs


def flops() -> str:
    """Return the text of docs/flops.md."""
    text = FLOPS + _row(["model or checkpoint", "input", "GMACs", "published", "difference", "why"])
    text += "| --- | ---: | ---: | ---: | ---: | --- |\n"
    for family in vitzoo.registry.families():
        printed = {m: p.gmacs for m, p in family.models.items() if p.gmacs or family.origin == "vitzoo"}
        printed |= {tag: info.gmacs for tag, info in family.tags.items() if info.gmacs}
        for name, published in printed.items():
            ours = _gmacs(name)
            off = published and ours / published - 1
            why = WHY.get(family.name) if off and abs(off) > 0.02 else None
            size = "x".join(map(str, timm.get_pretrained_cfg(name).input_size[1:]))
            text += _row([f"`{name}`", size, f"{ours:.3f}", published, off and f"{off:+.1%}", why])
    return text


if __name__ == "__main__":
    for page, text in (("models.md", models()), ("flops.md", flops())):
        Path(__file__).with_name(page).write_text(text)
