"""A quantized model, and what was done to each of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from vitzoo.quantization.choice import Cost
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import Site
from vitzoo.quantization.simulate import SitePlan, simulated


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one site.

    Attributes:
        name: of the site.
        kind: "linear", "conv" or "product".
        bits: of weight and activation; None where it stays in floating point.
        mode: "static", "dynamic" or "float"; with " u8" behind it where weights take all of uint8 (see
            `Recipe.reduce_range`).
        macs: an image.
        sqnr_db: signal to quantization noise of the site's output, in dB, this site alone quantized.
        logit_error: relative error of the logits, this site alone quantized; None if it was not measured.
        smooth: alpha of the migration into the site's weight, None for none.
        costs: what "auto" chose from: mode -> milliseconds and logit error.
        why: why it chose this mode.
    """

    name: str
    kind: str
    bits: int | None
    mode: str
    macs: int
    sqnr_db: float | None = None
    logit_error: float | None = None
    smooth: float | None = None
    costs: Mapping[str, Cost] | None = None
    why: str | None = None


class QuantizedModel(nn.Module):
    """A model whose products compute with quantized operands; the call takes images and returns logits.

    Attributes:
        recipe: what it was made by.
        float_graph: the captured graph after transforms that keep its function (BatchNorm folded, scales moved).
        sites: products of the graph that could be quantized.
        plans: site name -> how it is quantized; sites without one stay in floating point.
        layers: what was done to each site.
        logit_error: relative error of the logits on the calibration images.
        why_float: why "auto" left every site in floating point; None where some are quantized.
    """

    def __init__(
        self,
        recipe: Recipe,
        float_graph: fx.GraphModule,
        sites: Sequence[Site],
        plans: Mapping[str, SitePlan],
        layers: Sequence[LayerReport],
        logit_error: float,
        why_float: str | None = None,
    ) -> None:
        super().__init__()
        self.why_float = why_float
        self.recipe, self.sites, self.plans = recipe, tuple(sites), dict(plans)
        self.layers, self.logit_error = tuple(layers), logit_error
        self.float_graph = float_graph
        self.graph = simulated(float_graph, list(sites), plans)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return self.graph(x)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Return channels, height and width of the images."""
        shape = (
            next(node for node in self.float_graph.graph.nodes if node.op == "placeholder").meta["val"].shape
        )
        return int(shape[1]), int(shape[2]), int(shape[3])

    @property
    def quantized_macs(self) -> float:
        """Return the share of multiply-accumulates whose operands are quantized."""
        total = sum(site.macs for site in self.sites)
        return sum(site.macs for site in self.sites if site.name in self.plans) / max(1, total)
