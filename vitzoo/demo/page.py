"""The page of the demo: one HTML file with everything in it."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from vitzoo.demo.measure import photographs
from vitzoo.demo.pictures import Figure, Picture, data_uri
from vitzoo.demo.report import notes


def render_page(result: dict[str, Any], figures: list[Figure]) -> str:
    """Return the page.

    Args:
        result: what `demo.json` holds.
        figures: pictures of the models.
    """
    import jinja2

    from vitzoo.demo import UNTRAINED

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("vitzoo.demo").joinpath("page.html.j2").read_text("utf-8"))
    measured = [row for row in result["models"] if "error" not in row]
    untrained = any(row["weights"].startswith("untrained") for row in measured)
    return template.render(
        result=result,
        photographs=_photographs(),
        figures=figures,
        quantized=[row for row in measured if "int8" in row],
        untrained=UNTRAINED if untrained else "",
        notes=notes(result),
        slowest=max((row["latency_ms"]["median"] for row in measured), default=1.0),
        fastest=max((row["images_per_second"] for row in measured), default=1.0),
        worst=max((row["onnx"]["photo_relative_difference"] for row in measured), default=0.0),
    )


def _photographs() -> list[Picture]:
    says = {
        "china.jpg": "A Chinese palace with a pagoda roof before a hill",
        "flower.jpg": "A dahlia in bloom",
    }
    pictures = []
    for name, photo in photographs().items():
        small = photo.copy()
        small.thumbnail((640, 640))
        pictures.append(
            Picture(data_uri(small), says.get(name, name), f"{name}, {photo.width} x {photo.height}")
        )
    return pictures
