"""SmoothQuant's migration, group of channels by group of channels, with the strength that measurably helps.

Besides a LayerNorm and its linear readers, a convolution or linear layer and the layers that alone read it share a
change of scale per channel, through a ReLU too, which commutes with positive factors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vitzoo.quantization import calibration
from vitzoo.quantization.captured import Captured, Samples
from vitzoo.quantization.graph import (
    NormGroup,
    Recorder,
    Site,
    convolution_arguments,
    get_tensor,
    is_relu,
    norm_groups,
    set_tensor,
)
from vitzoo.quantization.quantizers import Uniform
from vitzoo.quantization.simulate import add_to_bias
from vitzoo.quantization.transforms import reparameterized, smoothing_scales

ALPHAS = (0.25, 0.5, 0.75)
# a migration is taken if it leaves at most this share of the squared error
WORTH = 0.9
ROWS = 4096


@dataclass(frozen=True)
class ChannelGroup:
    """Channels whose scale can change without changing the function.

    Attributes:
        node: name of the node that holds the channels.
        axis: their axis in it.
        inverse: parameters that are divided along their first axis.
        readers: (site, axis of the channels in its weight): weights that are multiplied.
    """

    node: str
    axis: int
    inverse: tuple[str, ...]
    readers: tuple[tuple[str, int], ...]


def channel_groups(module: fx.GraphModule, sites: Sequence[Site]) -> list[ChannelGroup]:
    """Return the groups of a captured graph: LayerNorms with linear readers, and chains of layers."""
    found = [
        ChannelGroup(group.norm, -1, (group.weight, group.bias), tuple((name, 1) for name in group.readers))
        for group in norm_groups(module, sites)
    ]
    nodes = {node.name: node for node in module.graph.nodes}
    by_node = {site.node: site for site in sites}
    for site in sites:
        node, result = nodes[site.node], nodes[site.result]
        parameters = [x for x in node.args[1:3] if isinstance(x, fx.Node)]
        if site.weight is None or any(len(x.users) > 1 or x.op != "get_attr" for x in parameters):
            continue
        if result is not node and not is_relu(
            result
        ):  # the bound of a ReLU6 does not move with a channel's scale
            continue
        readers = [_reader(by_node.get(user.name), user, result) for user in result.users]
        if readers and None not in readers:
            names = tuple(str(x.target) for x in parameters)
            axis = 1 if site.kind == "conv" else -1
            found.append(ChannelGroup(result.name, axis, names, tuple(r for r in readers if r is not None)))
    return found


def _reader(site: Site | None, node: fx.Node, x: fx.Node) -> tuple[str, int] | None:
    """Return a reader and the axis of its weight along which channels of x lie, None if there is none."""
    if site is None or site.weight is None or node.args[0] is not x:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or len(weight.users) > 1:
        return None
    if site.kind == "linear":
        return site.name, 1
    groups = convolution_arguments(node)[6]
    channels = int(x.meta["val"].shape[1])
    if groups == 1:
        return site.name, 1
    # one filter a channel; groups of several would need a scale for each place in a group
    return (site.name, 0) if groups == channels == int(weight.meta["val"].shape[0]) else None


def migrate(
    module: fx.GraphModule,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    weight_bits: int,
    symmetric: bool = False,
) -> dict[str, float]:
    """Move scales in place where that lowers the error of static quantization.

    For each group, the squared error that its readers' outputs get from quantized operands is estimated channel by
    channel, as the noise of the activation times the square of the weight and the reverse, without migration and with
    each alpha of `ALPHAS`. A migration has to save a tenth of it.

    Args:
        module: the captured graph, changed in place.
        sites: the sites that will be quantized.
        batches: calibration images, each (B, C, H, W).
        weight_bits: width of the weights.
        symmetric: activations will have ranges about zero.

    Returns:
        site -> alpha, of the readers whose scales were moved.

    Source: SmoothQuant (arXiv 2211.10438), equation 4; through ReLU: M. Nagel et al. (arXiv 1906.04721), section 4.1.
    """
    by_name = {site.name: site for site in sites}
    chosen: dict[str, float] = {}
    groups = channel_groups(module, sites)
    recorded = _recorded(module, groups, batches)  # a group's migration changes no other group's values
    for group in groups:
        seen = recorded[group.node]
        weights = [(get_tensor(module, str(by_name[name].weight)), axis) for name, axis in group.readers]
        columns = [weight.movedim(axis, -1).flatten(0, -2) for weight, axis in weights]  # (rows, C)
        rows = [_rows_of(weight, axis) for weight, axis in weights]
        largest = seen.abs().amax(0)
        candidates = [(0.0, torch.ones_like(largest))]
        candidates += [(alpha, smoothing_scales(largest, columns, alpha)) for alpha in ALPHAS]
        errors = [
            _error(seen / s, [w * s for w in columns], rows, weight_bits, symmetric) for _, s in candidates
        ]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] > WORTH * errors[0]:
            continue
        alpha, scales = candidates[best]
        for name in group.inverse:
            value = get_tensor(module, name)
            set_tensor(module, name, value / scales.reshape(-1, *[1] * (value.ndim - 1)))
        for (name, axis), (weight, _) in zip(group.readers, weights, strict=True):
            shape = [1] * weight.ndim
            shape[axis] = -1
            set_tensor(module, str(by_name[name].weight), weight * scales.reshape(shape))
            chosen[name] = alpha
    return chosen


def _recorded(
    module: fx.GraphModule, groups: Sequence[ChannelGroup], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return values of each group's channels, node -> (rows, C)."""
    axes = {group.node: group.axis for group in groups}
    parts: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str, x: Tensor) -> None:
        rows = x.detach().movedim(axes[name], -1).flatten(0, -2)
        parts[name].append(rows[:: max(1, -(-len(rows) * len(batches) // ROWS))].clone())

    recorder = Recorder(module, axes, keep)
    for x in batches:
        recorder.run(x)
    return {name: torch.cat(found) for name, found in parts.items()}


def _rows_of(weight: Tensor, axis: int) -> Tensor:
    """Return for each entry of a weight, laid out as (rows, C), the output channel whose scale it has."""
    channel = torch.arange(weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
    return channel.movedim(axis, -1).flatten(0, -2)


def _error(
    seen: Tensor, columns: Sequence[Tensor], rows: Sequence[Tensor], bits: int, symmetric: bool
) -> float:
    """Return the squared error of the readers' outputs relative to their squares, channels taken as independent."""
    quantizer = calibration.fit_range(seen, 8, symmetric=symmetric)
    power, noise = seen.square().mean(0), (quantizer(seen) - seen).square().mean(0)  # (C,)
    total = 0.0
    for weight, channel in zip(columns, rows, strict=True):
        bound = weight.new_zeros(int(channel.max()) + 1)
        bound = bound.scatter_reduce(0, channel.flatten(), weight.abs().flatten(), "amax")
        rounded = calibration.symmetric(bound[channel], bits)(weight)
        signal = (power * weight.square().sum(0)).sum()
        lost = (noise * weight.square().sum(0)).sum() + (power * (rounded - weight).square().sum(0)).sum()
        total += float(lost / signal.clamp_min(torch.finfo(signal.dtype).tiny))
    return total


def move_scales(captured: Captured) -> dict[str, Uniform]:
    """Move scales out of the activations as the recipe says; return the quantizers this fixes, by norm node."""
    if captured.recipe.smooth == "auto":
        captured.tell("move scales out of the activations where it helps")
        bits = 7 if captured.recipe.reduce_range else captured.recipe.weight_bits
        captured.alphas |= migrate(
            captured.module, captured.sites, captured.batches, bits, captured.recipe.symmetric
        )
    groups = norm_groups(captured.module, captured.sites)
    if not groups or (captured.recipe.smooth is None and captured.recipe.norm != "channel"):
        return {}
    captured.tell("move scales out of the activations")
    if captured.recipe.smooth is not None and captured.recipe.smooth != "auto":
        seen = captured.record([group.norm for group in groups])
        for group in groups:
            _smooth(captured, group, seen[group.norm])
    if captured.recipe.norm != "channel":
        return {}
    seen = captured.record([group.norm for group in groups])
    return {group.norm: _reparameterize(captured, group, seen[group.norm].values) for group in groups}


def _readers(captured: Captured, group: NormGroup) -> list[tuple[Site, Tensor]]:
    sites = [captured.by_name[name] for name in group.readers]
    return [(site, captured.weight(site)) for site in sites]


def _smooth(captured: Captured, group: NormGroup, seen: Samples) -> None:
    assert seen.channel_max is not None
    assert isinstance(captured.recipe.smooth, float | int)
    readers = _readers(captured, group)
    scales = smoothing_scales(seen.channel_max, [weight for _, weight in readers], captured.recipe.smooth)
    for name in (group.weight, group.bias):
        set_tensor(captured.module, name, get_tensor(captured.module, name) / scales)
    for site, weight in readers:
        set_tensor(captured.module, str(site.weight), weight * scales)
        captured.alphas[site.name] = captured.recipe.smooth


def _reparameterize(captured: Captured, group: NormGroup, values: Tensor) -> Uniform:
    channels = calibration.fit_percentile(values, captured.recipe.activation_bits, 1)
    weight, bias = get_tensor(captured.module, group.weight), get_tensor(captured.module, group.bias)
    moved = reparameterized(weight, bias, channels, round_zero_point=True)
    set_tensor(captured.module, group.weight, moved.norm_weight)
    set_tensor(captured.module, group.bias, moved.norm_bias)
    for site, matrix in _readers(captured, group):
        set_tensor(captured.module, str(site.weight), matrix * moved.ratio)
        add_to_bias(captured.module, captured.nodes[site.node], site, (matrix * moved.ratio) @ moved.shift)
    captured.module.recompile()
    return moved.quantizer
