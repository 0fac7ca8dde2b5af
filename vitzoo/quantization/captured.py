"""A trained model as it is quantized: its graph, sites and images, and what quantizing sites does to the logits."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import Recorder, Site, capture, find_sites, get_tensor
from vitzoo.quantization.simulate import Simulator, SitePlan
from vitzoo.quantization.sweep import logit_errors

# Values of one operand kept for fitting; more images than fill it are thinned evenly.
SAMPLE = 1 << 20


@dataclass
class Samples:
    """Values that a node took during calibration: thinned to `SAMPLE`; its extremes and its channels' magnitudes."""

    parts: list[Tensor] = field(default_factory=list)
    channel_max: Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    def add(self, x: Tensor, batches: int) -> None:
        """Add what the node took for one of so many batches."""
        largest = x.detach().abs().flatten(0, -2).amax(0)
        self.channel_max = largest if self.channel_max is None else torch.maximum(self.channel_max, largest)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        rows = x.detach().flatten(0, -2)
        step = max(1, -(-rows.numel() * batches // SAMPLE))
        self.parts.append(rows[::step].clone())

    @property
    def values(self) -> Tensor:
        """Return the rows kept, (rows, C)."""
        return torch.cat(self.parts)


class Captured:
    """A model's graph, which transforms change in place, and the images that it is calibrated on.

    Args:
        model: a trained model, float32, on the CPU; it is not changed.
        recipe: how it is quantized.
        batches: calibration images, (B, C, H, W), all of one size.
        filter_fn: which sites may be quantized; all if None.
        tell: called with a few words at the start of each step.

    Attributes:
        module: the captured graph.
        all_sites: every product of it.
        sites: those that the recipe quantizes.
        nodes: name -> node.
        by_name: name -> site, of all.
        bits: site -> width.
        alphas: site -> SmoothQuant's alpha, of those whose scales were moved.
        logits: of the float graph, of all batches.

    Raises:
        ValueError: no images, images of several sizes, or a recipe that finds nothing to quantize.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: list[Tensor],
        filter_fn: Callable[[Site], bool] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if not batches or not sum(len(x) for x in batches):
            raise ValueError("there are no calibration images; give at least one batch (B, C, H, W)")
        sizes = {tuple(x.shape[1:]) for x in batches}
        if len(sizes) > 1:
            raise ValueError(f"calibration images have several sizes: {', '.join(map(str, sorted(sizes)))}")
        self.model, self.recipe, self.batches = model, recipe, batches
        self.tell = tell or (lambda step: None)
        self.tell("capture the graph")
        self.module = capture(model, torch.zeros(2, *batches[0].shape[1:]))
        self.all_sites = find_sites(self.module)
        self.sites = [
            site for site in self.all_sites if self._wanted(site) and (filter_fn is None or filter_fn(site))
        ]
        if not self.sites:
            raise ValueError(f"recipe {recipe.name!r} finds nothing to quantize in {type(model).__name__}")
        self.nodes = {node.name: node for node in self.module.graph.nodes}
        self.by_name = {site.name: site for site in self.all_sites}
        self.alphas: dict[str, float] = {}
        self.bits = {site.name: self._bits(site) for site in self.sites}
        with torch.inference_mode():
            self.logits = torch.cat([self.module(x) for x in batches])

    def _wanted(self, site: Site) -> bool:
        if any(fnmatch.fnmatch(site.name, pattern) for pattern in self.recipe.skip):
            return False
        return site.kind != "product" or self.recipe.products

    def _bits(self, site: Site) -> int:
        weighted = [s.name for s in self.all_sites if s.kind != "product"]
        ends = (weighted[0], weighted[-1]) if weighted else ()
        return self.recipe.first_last_bits if site.name in ends else self.recipe.weight_bits

    def weight(self, site: Site) -> Tensor:
        """Return a site's weight."""
        return get_tensor(self.module, str(site.weight))

    def record(self, nodes: Iterable[str]) -> dict[str, Samples]:
        """Run all batches and return what nodes took."""
        found: dict[str, Samples] = defaultdict(Samples)
        recorder = Recorder(self.module, nodes, lambda name, x: found[name].add(x, len(self.batches)))
        for x in self.batches:
            recorder.run(x)
        return found

    def first(self, images: int) -> tuple[Tensor, ...]:
        """Return the first images, in batches."""
        return torch.cat(self.batches)[:images].split(len(self.batches[0]))

    def error(self, plans: Mapping[str, SitePlan]) -> float:
        """Return the relative error of the logits with these plans."""
        simulator = Simulator(self.module, self.sites, plans)
        out = torch.cat([simulator.run(x) for x in self.batches])
        return float((out - self.logits).norm() / self.logits.norm())

    def errors(self, plans: Mapping[str, SitePlan], images: int) -> dict[str, float]:
        """Return the relative error of the logits with each site alone quantized, on the first images."""
        options = {name: {"": plan} for name, plan in plans.items()}
        found = logit_errors(self.module, self.sites, options, self.first(images))
        return {name: of_site[""] for name, of_site in found.items()}

    def noise(self, plans: Mapping[str, SitePlan]) -> dict[str, float]:
        """Return each site's signal to noise ratio in dB on the first batch, its inputs exact."""
        found: dict[str, float] = {}

        def compare(name: str, exact: Tensor, quantized: Tensor) -> None:
            noise = (quantized - exact).square().sum() / exact.square().sum()
            found[name] = float(-10 * torch.log10(noise.clamp_min(1e-20)))

        Simulator(self.module, self.sites, plans, compare).run(self.batches[0])
        return found
