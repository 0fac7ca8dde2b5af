"""Write docs/models.md from the registry (`make docs`); tests/test_docs.py fails when the two differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import vitzoo

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


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(models())
