"""`vitzoo list`, `info`, `flops` and `doctor`: what there is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

import vitzoo
from vitzoo.cli.common import (
    Json,
    Model,
    Settings,
    Size,
    app,
    create,
    explained,
    parse_img_size,
    print_json,
    print_table,
    stderr,
)


@app.command(
    "list", epilog="Examples: `vitzoo list` · `vitzoo list 'vim*'` · `vitzoo list --category hilo --json`"
)
def list_command(
    filter: Annotated[str, typer.Argument(help="Wildcard pattern.")] = "*",
    category: Annotated[str | None, typer.Option(help=", ".join(vitzoo.CATEGORIES))] = None,
    family: Annotated[str | None, typer.Option(help="Family name, e.g. litv2.")] = None,
    json: Json = False,
) -> None:
    """List the models of the zoo, timm's by reference included."""
    with explained():
        rows = [_listed(name) for name in vitzoo.list_models(filter, category, family)]
    if json:
        print_json(rows)
        return
    columns = ["model", "family", "categories", "params (M)", "GMACs", "top-1", "from"]
    cells = [
        [
            r["model"],
            r["family"],
            ", ".join(r["categories"]),
            _millions(r["params"]),
            r["gmacs"],
            r["top1"],
            r["origin"],
        ]
        for r in rows
    ]
    print_table(f"{len(rows)} models; figures as published", columns, cells)


def _listed(name: str) -> dict[str, Any]:
    family = vitzoo.registry.family_of(name)
    assert family is not None, "list_models lists members of families only"
    figures = family.models[name]
    return {
        "model": name,
        "family": family.name,
        "categories": family.categories,
        "params": figures.params,
        "gmacs": figures.gmacs,
        "top1": figures.top1,
        "origin": family.origin,
    }


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f}"


@app.command(epilog="Example: `vitzoo info evit_small_patch16_224`")
def info(model: Model, json: Json = False) -> None:
    """Say what is known of a model: paper, licences, published figures, checkpoints."""
    with explained():
        found = vitzoo.model_info(model)
    if json:
        print_json(dataclasses.asdict(found))
        return
    fields = dataclasses.asdict(found)
    checkpoints = fields.pop("checkpoints")
    fields["categories"] = ", ".join(found.categories)
    fields["input_size"] = " x ".join(map(str, found.input_size))
    print_table(found.name, ["field", "value"], [[k, v] for k, v in fields.items() if k != "name"])
    rows = [
        [
            c["name"],
            ", ".join(f"{k}={v}" for k, v in c["args"].items()),
            c["top1"],
            c["url"] or c["get"],
            c["license"],
        ]
        for c in checkpoints
    ]
    print_table("checkpoints", ["tag", "sets", "top-1", "file", "licence"], rows)


@app.command(
    epilog="Examples: `vitzoo flops vim_tiny_patch16_224` · `vitzoo flops litv2_small --img-size 384x512`"
)
def flops(
    model: Model,
    img_size: Size = None,
    kwargs: Settings = None,
    scan_convention: Annotated[
        str, typer.Option(help="exact, or paper (9BLDN, as Mamba papers count).")
    ] = "exact",
    depth: Annotated[int, typer.Option(help="Module levels to show.")] = 1,
    json: Json = False,
) -> None:
    """Count multiply-accumulates and FLOPs of one image, by kind and by module."""
    from vitzoo.benchmark.flops import count_flops
    from vitzoo.benchmark.models import input_size

    with explained():
        built = create(model, img_size, kwargs, None)
        size = input_size(built, parse_img_size(img_size))
        count = count_flops(built, input_size=size, scan_convention=scan_convention)
    if count.uncounted_ops:
        stderr.print(
            f"warning: not counted, for want of a formula: {', '.join(count.uncounted_ops)}", markup=False
        )
    if json:
        print_json({"model": model, **count.to_dict()})
        return
    rows = [["total", f"{count.gmacs:.4f}", f"{count.gflops:.4f}"]]
    rows += [[f"kind: {k}", f"{v:.4f}", f"{2 * v:.4f}"] for k, v in count.by_kind.items()]
    rows += [
        [name, f"{v:.4f}", f"{2 * v:.4f}"]
        for name, v in count.by_module.items()
        if name.count(".") < depth and v
    ]
    print_table(
        f"{model} at {'x'.join(map(str, size))}, {count.params:,} parameters",
        ["what", "GMACs", "GFLOPs"],
        rows,
    )


@app.command(epilog="Example: `vitzoo doctor --json`")
def doctor(json: Json = False) -> None:
    """Say what works here: versions, processor, each operator's backends or why not."""
    from vitzoo.doctor import diagnose

    with explained():
        found = diagnose()
    if json:
        print_json(found)
        return
    cpu = found["machine"]["cpu"]
    rows = [[name, number] for name, number in found["machine"]["versions"].items()]
    rows += [["CPU", cpu["model"]], ["instruction sets", " ".join(cpu["flags"])]]
    rows += [["cores, threads", f"{cpu['usable_cores']}, {cpu['threads']}"]]
    rows += [["GPU", ", ".join(g["name"] for g in found["machine"]["gpus"]) or "none that PyTorch can use"]]
    extension = found["extension"]
    rows += [["vitzoo._C", extension["why_not"] or f"loaded, instruction set {extension['isa']}"]]
    print_table("this machine", ["what", "found"], rows)
    backends = [
        [entry["operator"], name, reason or ("runs here" if name == entry["runs"] else "available")]
        for entry in found["operators"]
        for name, reason in entry["backends"].items()
    ]
    print_table("operators", ["operator", "backend", "state"], backends)
    packages = [
        [name, p["version"] or "missing", p["for"], "" if p["version"] else p["install"]]
        for name, p in found["packages"].items()
    ]
    print_table("optional packages", ["package", "version", "for", "install"], packages)
