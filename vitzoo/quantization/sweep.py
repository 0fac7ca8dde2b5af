"""What each layer alone does to the logits: one exact run of the graph, and from each site a second end to it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from vitzoo.quantization.graph import Site
from vitzoo.quantization.simulate import Simulator, SitePlan


class Sweep(Simulator):
    """Runs a captured graph exactly and finishes it once more for each way of quantizing each site.

    A site's second run starts behind it, from the exact values that are still needed there, so that on average half
    the graph is computed for a site.

    Args:
        module: the graph.
        sites: its sites.
        options: site name -> name of an option -> plan.
    """

    def __init__(
        self, module: fx.GraphModule, sites: Iterable[Site], options: Mapping[str, Mapping[str, SitePlan]]
    ) -> None:
        super().__init__(module, (), {})
        self.options = options
        self.by_node = {site.node: site for site in sites if options.get(site.name)}
        self.order = [*self.graph.nodes]
        # a graph that writes into its tensors would spoil the exact values for the sites that follow
        self.mutates = any(
            node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
            for node in self.order
        )
        self.exact: Tensor | None = None

    def sweep(self, x: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (site, option, logits) of images (B, C, H, W); `exact` holds the exact logits afterwards."""
        self.args_iter = iter(self.graph.process_inputs(x))
        self.env = {}
        for index, node in enumerate(self.order):
            site = self.by_node.get(node.name)
            if site is not None:
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                for name, plan in self.options[site.name].items():
                    out = self.quantized(site, plan, node.target, args, kwargs)
                    yield site.name, name, self._finished(index, out)
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]
        self.exact = self.graph.process_outputs(self.env[self.order[-1]])

    def _finished(self, index: int, out: Tensor) -> Tensor:
        """Return the logits with another value of a node; what the exact run still needs is kept."""
        kept = self.env
        self.env = {**kept, self.order[index]: out}
        if self.mutates:
            live = [node for node in kept if node.op != "get_attr"]
            # all in one copy, since views have to go on sharing their storage
            self.env |= zip(live, copy.deepcopy([kept[node] for node in live]), strict=True)
        try:
            for node in self.order[index + 1 :]:
                self.env[node] = self.run_node(node)
                for dead in self.user_to_last_uses.get(node, ()):
                    del self.env[dead]
            return self.graph.process_outputs(self.env[self.order[-1]])
        finally:
            self.env = kept


@torch.inference_mode()
def logit_errors(
    module: fx.GraphModule,
    sites: Sequence[Site],
    options: Mapping[str, Mapping[str, SitePlan]],
    batches: Iterable[Tensor],
) -> dict[str, dict[str, float]]:
    """Return the relative error of the logits when one site alone is quantized, for each site and option.

    The error is norm(quantized - exact) / norm(exact) over all images.

    Args:
        module: the captured graph.
        sites: its sites.
        options: site name -> name of an option -> plan.
        batches: images, each (B, C, H, W).
    """
    squares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    size = 0.0
    runner = Sweep(module, sites, options)
    for x in batches:
        outputs = [*runner.sweep(x)]
        assert runner.exact is not None
        size += float(runner.exact.square().sum())
        for site, option, logits in outputs:
            squares[site][option] += float((logits - runner.exact).square().sum())
    return {
        site: {option: (square / size) ** 0.5 for option, square in found.items()}
        for site, found in squares.items()
    }
