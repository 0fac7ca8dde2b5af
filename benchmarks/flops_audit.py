"""Count models with three counters on real CPU tensors and say operator by operator where they differ.

    python benchmarks/flops_audit.py  (some minutes; writes benchmarks/results/flops_audit.json)

Every model of ours, every checkpoint of ours and every model by reference whose authors printed a figure goes through
`vitzoo.count_flops`, `torch.utils.flop_counter` (halved: it counts two for a multiply-accumulate) and fvcore.
docs/generate.py sets the file's figures beside the published ones in docs/flops.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitzoo
from vitzoo.benchmark.flops import FlopCount
from vitzoo.benchmark.machine import machine, version

RESULT = Path(__file__).with_name("results") / "flops_audit.json"
# what fvcore calls the products that all three count; the rest of what it counts is norms, pooling, resampling
PRODUCTS = {"conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}


def audited() -> list[str]:
    """Return the models and checkpoints to count: ours, and those by reference with a published figure."""
    names = []
    for family in vitzoo.registry.families():
        names += [m for m, figures in family.models.items() if figures.gmacs or family.origin == "vitzoo"]
        names += [tag for tag, info in family.tags.items() if info.gmacs]
    return names


def audit(name: str) -> dict[str, Any]:
    """Count one model or checkpoint with each counter, one image at its own size.

    Returns:
        GMACs of each counter; ours by kind; `torch_terms` and `fvcore_terms`, what is to be added to ours to get
        theirs, by operator; for models with a scan, `paper_gmacs` in the convention of the Mamba papers.
    """
    size = timm.get_pretrained_cfg(name).input_size
    model = vitzoo.create_model(name).eval()
    ours = vitzoo.count_flops(model, size)
    assert not ours.uncounted_ops, f"{name}: {ours.uncounted_ops}"
    row: dict[str, Any] = {"model": name, "input_size": list(size), "gmacs": ours.gmacs}
    row["by_kind"] = dict(ours.by_kind)
    if "scan" in ours.by_kind:
        row["paper_gmacs"] = vitzoo.count_flops(model, size, scan_convention="paper").gmacs
    x = torch.zeros(1, *size)
    row["torch_gmacs"], row["torch_terms"] = by_torch(model, x, ours)
    row["fvcore_gmacs"], row["fvcore_terms"] = by_fvcore(model, x, ours)
    return rounded(row)


def by_torch(model: nn.Module, x: torch.Tensor, ours: FlopCount) -> tuple[float, dict[str, float]]:
    """Return the GMACs of torch.utils.flop_counter, and its count less ours for every operator that differs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    theirs = {str(op).replace(".", "::"): n / 2e9 for op, n in counter.get_flop_counts()["Global"].items()}
    terms = {op: theirs.get(op, 0.0) - ours.by_operator.get(op, 0.0) for op in {*theirs, *ours.by_operator}}
    return counter.get_total_flops() / 2e9, terms


def by_fvcore(model: nn.Module, x: torch.Tensor, ours: FlopCount) -> tuple[float, dict[str, float]]:
    """Return fvcore's GMACs, and what it counts that we do not, what it does not see, and what is left.

    It follows a trace, where fused attention and operators of extensions have names without a rule of its own.
    """
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, about Python numbers
        theirs = {op: n / 1e9 for op, n in analysis.by_operator().items()}
        unseen = [op for op in analysis.unsupported_ops() if op.partition("::")[0] != "aten"]
        attention = "aten::scaled_dot_product_attention" in analysis.unsupported_ops()
    terms = {op: n for op, n in theirs.items() if op not in PRODUCTS}
    terms |= {op: -ours.by_operator[op] for op in unseen if op in ours.by_operator}
    if attention:
        terms |= {op: -n for op, n in ours.by_operator.items() if "scaled_dot_product" in op}
    total = sum(theirs.values())
    terms["other products"] = total - ours.gmacs - sum(terms.values())
    return total, terms


def rounded(value: Any) -> Any:
    """Return GMACs to the thousand operations, terms of nothing left out."""
    if isinstance(value, dict):
        return {k: v for k, v in ((k, rounded(v)) for k, v in value.items()) if v != 0}
    return round(value, 6) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for name in audited():
        rows.append(audit(name))
        print(f"{name}: {rows[-1]['gmacs']:.3f} GMACs", file=sys.stderr)
    surroundings = machine()
    surroundings["versions"]["fvcore"] = version("fvcore")
    partial = args.output.with_suffix(".part")
    partial.write_text(json.dumps({"machine": surroundings, "rows": rows}, indent=1) + "\n")
    partial.replace(args.output)


if __name__ == "__main__":
    main()
