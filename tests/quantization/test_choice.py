"""Modes chosen under an error budget, migrations, rounding and bias correction, each on a model where it must help."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitzoo.quantization.api import quantize
from vitzoo.quantization.calibration import symmetric
from vitzoo.quantization.choice import FLOAT, Cost, choose, fastest_file, reason
from vitzoo.quantization.config import Recipe
from vitzoo.quantization.graph import capture, find_sites
from vitzoo.quantization.migration import channel_groups, migrate
from vitzoo.quantization.rounding import round_least_squares
from vitzoo.testing import image, relative_difference

SIZE = 32
BATCHES = [image((4, 3, SIZE, SIZE), seed) for seed in range(3)]
HELD_BACK = image((4, 3, SIZE, SIZE), 9)
COSTS = {
    "a": {FLOAT: Cost(9.0, 0.0), "static": Cost(3.0, 0.020), "dynamic": Cost(4.0, 0.004)},
    "b": {FLOAT: Cost(5.0, 0.0), "static": Cost(4.0, 0.010), "dynamic": Cost(6.0, 0.003)},
    "c": {FLOAT: Cost(2.0, 0.0), "static": Cost(2.5, 0.001)},
    "d": {FLOAT: Cost(8.0, 0.0), "static": Cost(2.0, 0.002), "dynamic": Cost(2.2, 0.002)},
}
MACS = {"a": 50, "b": 30, "c": 10, "d": 11}


def _total(choice: Mapping[str, str]) -> float:
    return math.sqrt(sum(COSTS[layer][option].logit_error ** 2 for layer, option in choice.items()))


def _ms(choice: Mapping[str, str]) -> float:
    return sum(COSTS[layer][option].ms for layer, option in choice.items())


def test_without_pressure_each_layer_takes_its_fastest_mode() -> None:
    found = choose(COSTS, 1.0, _total, MACS)
    assert found == {"a": "static", "b": "static", "c": FLOAT, "d": "static"}


@pytest.mark.parametrize("budget", [0.0221, 0.012, 0.0105, 0.005, 0.0041, 0.001, 0.0])
def test_the_budget_holds_at_little_more_than_the_least_time(budget: float) -> None:
    found = choose(COSTS, budget, _total, MACS)
    assert _total(found) <= budget
    every = (dict(zip(COSTS, options, strict=True)) for options in itertools.product(*COSTS.values()))
    best = min((choice for choice in every if _total(choice) <= budget), key=_ms)
    # on the convex hull: one step of one layer at most behind the exact answer
    assert _ms(found) <= _ms(best) + max(c[FLOAT].ms - min(x.ms for x in c.values()) for c in COSTS.values())
    if budget in (0.0221, 0.012, 0.0):
        assert _ms(found) == _ms(best)


def test_coverage_takes_the_cheapest_layers_out_of_floating_point() -> None:
    slow = {layer: {**options, FLOAT: Cost(1.0, 0.0)} for layer, options in COSTS.items()}
    assert set(choose(slow, 1.0, _total, MACS).values()) == {FLOAT}
    found = choose(slow, 1.0, _total, MACS, least_integer_macs=60)
    assert found == {"a": "static", "b": FLOAT, "c": FLOAT, "d": "static"}


def test_the_reason_names_what_was_given_up() -> None:
    assert reason(COSTS["a"], "static") == "the fastest"
    assert reason(COSTS["a"], "dynamic") == (
        "the error budget: static takes 3.000 ms, dynamic 4.000 ms, and their logit errors are 2.00% and 0.40%"
    )
    assert reason(COSTS["c"], "static") == "integer coverage: float takes 2.000 ms, static 2.500 ms"


FASTEST = {"a": "dynamic", "b": "static", "c": FLOAT, "d": "dynamic"}


class Files:
    """A clock for whole files: their speed follows from the choice, and every choice asked for is kept."""

    def __init__(self, speed: Callable[[Mapping[str, str]], float]) -> None:
        self.speed = speed
        self.seen: list[dict[str, str]] = []

    def __call__(self, choices: Sequence[Mapping[str, str]]) -> list[float]:
        self.seen += map(dict, choices)
        return [self.speed(choice) for choice in choices]


def _integers(choice: Mapping[str, str]) -> set[str]:
    return {layer for layer, option in choice.items() if option != FLOAT}


def _whole(files: Files, budget: float = 1.0) -> tuple[dict[str, str], float]:
    return fastest_file(FASTEST, COSTS, lambda choice: _total(choice) <= budget, files)


def test_a_choice_whose_file_is_faster_than_float_stays() -> None:
    files = Files(lambda choice: 1.5)
    assert _whole(files) == (FASTEST, 1.5)
    static = FASTEST | {"a": "static", "d": "static"}
    assert files.seen == [FASTEST, static], "nothing thinner is timed"
    chains = Files(lambda choice: 1.5 + 0.1 * [*choice.values()].count("static"))
    assert _whole(chains) == (static, pytest.approx(1.8))
    assert _whole(chains, budget=0.02)[0] == FASTEST, "static scales throughout exceed the budget"


def test_layers_whose_whole_file_is_slower_return_to_float() -> None:
    speeds = {3: 0.7, 1: 1.2}
    files = Files(lambda choice: speeds[len(_integers(choice))])
    found, speed = _whole(files)
    assert speed == 1.2
    assert found == {"a": FLOAT, "b": FLOAT, "c": FLOAT, "d": "dynamic"}, "d saves most by itself"


@pytest.mark.parametrize("speed", [0.67, 1.0, 1.019])
def test_no_file_that_is_slower_than_float_is_chosen(speed: float) -> None:
    files = Files(lambda choice: speed)
    assert _whole(files) == (dict.fromkeys(COSTS, FLOAT), speed)
    assert len(files.seen) == 3


def test_a_file_that_is_faster_by_little_is_timed_again() -> None:
    lucky: list[dict[str, str]] = []

    def once(choice: Mapping[str, str]) -> float:
        lucky.append(dict(choice))
        return 1.05 if lucky.count(dict(choice)) == 1 else 0.97

    files = Files(once)
    assert _whole(files) == (dict.fromkeys(COSTS, FLOAT), 0.97)
    assert {lucky.count(choice) for choice in lucky} == {2}
    assert _whole(Files(lambda choice: 1.05)) == (FASTEST, 1.05)


def test_all_in_float_is_not_timed() -> None:
    files = Files(lambda choice: 2.0)
    floating = dict.fromkeys(COSTS, FLOAT)
    assert fastest_file(floating, COSTS, lambda choice: True, files) == (floating, 0.0)
    assert files.seen == []


class Uneven(nn.Module):
    """Convolutions and linear layers whose channels differ a hundredfold, between ReLUs and behind a LayerNorm."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.point = nn.Conv2d(16, 32, 1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.last = nn.Conv2d(32, 24, 1, bias=False)
        self.norm = nn.LayerNorm(24)
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 10)
        with torch.no_grad():  # the weights that read a small channel are large: its noise counts as much
            for layer, reader in ((self.stem, self.point), (self.point, self.deep), (self.norm, self.fc1)):
                channels = len(layer.bias)
                spread = torch.logspace(-1, 1, channels)[torch.randperm(channels)]
                layer.weight *= spread.reshape(-1, *[1] * (layer.weight.ndim - 1))
                layer.bias *= spread
                axis = 0 if reader is self.deep else 1
                reader.weight /= spread.reshape([-1 if i == axis else 1 for i in range(reader.weight.ndim)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x))))
        x = self.last(torch.relu(self.deep(x))).flatten(2).transpose(1, 2)  # (B, 64, 24)
        return self.fc2(torch.relu(self.fc1(self.norm(x)))).mean(1)


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    return Uneven().eval()


def _error(model: nn.Module, recipe: Recipe, **kwargs: Any) -> float:
    with torch.no_grad():
        return relative_difference(quantize(model, recipe, BATCHES, **kwargs)(HELD_BACK), model(HELD_BACK))


def test_migration_keeps_the_function_and_pays_where_channels_are_uneven(uneven: nn.Module) -> None:
    graph = capture(uneven, BATCHES[0][:2])
    sites = find_sites(graph)
    groups = {group.readers[0][0]: group.readers for group in channel_groups(graph, sites)}
    assert groups == {
        "point": (("point", 1),),
        "deep": (("deep", 0),),
        "last": (("last", 1),),
        "fc1": (("fc1", 1),),
        "fc2": (("fc2", 1),),
    }
    with torch.inference_mode():
        moved = migrate(graph, sites, BATCHES, 8)
        assert {"deep", "last", "fc1"} <= {*moved}
        assert relative_difference(graph(HELD_BACK), uneven(HELD_BACK)) < 1e-5
    assert _error(uneven, Recipe("s", smooth="auto")) < 0.2 * _error(uneven, Recipe("plain"))


def test_migration_leaves_even_channels_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten()).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.sign_()
            layer.bias.zero_()
    graph = capture(net, BATCHES[0][:2])
    with torch.inference_mode():
        assert migrate(graph, find_sites(graph), BATCHES, 8) == {}


@pytest.mark.parametrize(("act", "moves"), [(nn.ReLU(), True), (nn.ReLU6(), False)], ids=str)
def test_migration_goes_through_what_has_no_bound(act: nn.Module, moves: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), act, nn.Conv2d(8, 8, 1), nn.Flatten()).eval()
    graph = capture(net, BATCHES[0][:2])
    sites = find_sites(graph)
    assert sites[0].result != sites[0].node  # both are part of the convolution's codes
    assert [group.readers for group in channel_groups(graph, sites)] == [(("2", 1),)] * moves


def test_least_squares_rounding_lowers_the_error_of_correlated_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator) @ torch.diag(torch.logspace(0, -2, 48))
    x = torch.randn(2, 4000, 48, generator=generator) @ mix
    weight = torch.randn(2, 16, 48, generator=generator)
    quantizer = symmetric(weight.abs().amax(-1, keepdim=True), 4)
    found = round_least_squares(weight, quantizer, x.mT @ x)
    assert torch.equal(quantizer(found), found)
    fresh = torch.randn(2, 4000, 48, generator=generator) @ mix

    def loss(values: Tensor) -> float:
        return float(((values - weight) @ fresh.mT).square().sum())

    assert loss(found) < 0.5 * loss(quantizer(weight))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_by_least_squares_pays_in_a_network(uneven: nn.Module, bits: int) -> None:
    common = dict(weight_bits=bits, activation_bits=8, first_last_bits=bits, smooth=0.5)
    plain = _error(uneven, Recipe("nearest", **common))
    assert (
        _error(uneven, Recipe("gptq", **common, rounding="least_squares")) < (0.8 if bits == 4 else 1) * plain
    )


class Shifted(nn.Module):
    """A layer whose inputs have a mean: rounding its weights shifts its outputs."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 32, 4, stride=4), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x) + 4).flatten(2).mean(-1))


def test_bias_correction_gives_back_the_mean() -> None:
    model = Shifted().eval()
    low = dict(weight_bits=4, first_last_bits=4)
    plain = _error(model, Recipe("plain", **low))
    assert _error(model, Recipe("corrected", **low, bias_correction=True)) < 0.5 * plain


def _clock(ms: Mapping[str, float]) -> Any:
    """Return a clock by which every layer takes the same time in a mode."""

    def clock(module: Any, sites: Any, x: Tensor, modes: Mapping[str, Sequence[str]]) -> Any:
        return {name: {mode: ms[mode] for mode in (FLOAT, *found)} for name, found in modes.items()}

    return clock


AUTO = Recipe("auto", activations="auto", error_budget=0.5)


def test_auto_follows_the_times_and_the_budget(uneven: nn.Module) -> None:
    times = {FLOAT: 3.0, "static": 1.0, "dynamic": 2.0}
    fast = quantize(uneven, AUTO, BATCHES, clock=_clock(times))
    assert {layer.mode for layer in fast.layers} == {"static"}
    assert {layer.why for layer in fast.layers} == {"the fastest"}
    dynamic = quantize(uneven, AUTO, BATCHES, clock=_clock({**times, "dynamic": 0.5}))
    modes = {layer.name: layer.mode for layer in dynamic.layers}
    # of convolutions only those that are products of matrices
    assert modes == dict.fromkeys(modes, "dynamic") | {"stem": "static", "deep": "static"}
    budget = 0.6 * fast.logit_error
    held = quantize(
        uneven, Recipe("a", activations="auto", error_budget=budget), BATCHES, clock=_clock(times)
    )
    assert held.logit_error <= budget
    changed = [layer for layer in held.layers if layer.mode != "static"]
    assert changed
    assert all(layer.why.startswith("the error budget: static takes 1.000 ms") for layer in changed)
    again = quantize(
        uneven, Recipe("a", activations="auto", error_budget=budget), BATCHES, clock=_clock(times)
    )
    assert again.layers == held.layers


def test_auto_gives_float_where_no_whole_file_is_faster(uneven: nn.Module) -> None:
    times = {FLOAT: 3.0, "static": 1.0, "dynamic": 2.0}
    raced: list[int] = []

    def race(candidates: Sequence[Any]) -> list[float]:
        raced.extend(len(candidate.plans) for candidate in candidates)
        return [0.67] * len(candidates)

    found = quantize(uneven, AUTO, BATCHES, clock=_clock(times), race=race)
    assert raced == [6, 3, 1]
    assert found.plans == {}
    assert found.logit_error < 1e-6
    assert found.why_float == (
        "float is the fastest that holds the error budget of 50.0%: the best file with layers in integers had 0.67 "
        "times its speed"
    )
    assert {layer.why for layer in found.layers} == {found.why_float}
    slow = quantize(uneven, AUTO, BATCHES, clock=_clock({**times, FLOAT: 0.5}), race=lambda c: [2.0] * len(c))
    assert slow.why_float is None, "coverage asks for integers, and the whole file pays"
    tight = quantize(
        uneven, Recipe("a", activations="auto", error_budget=1e-9), BATCHES, clock=_clock(times), race=race
    )
    assert tight.why_float is not None
    assert tight.why_float.endswith("each layer in integers is slower by itself or exceeds it")
    assert len(raced) == 3, "there was nothing to time"


def test_auto_says_which_layers_the_whole_file_changed(uneven: nn.Module) -> None:
    times = {FLOAT: 3.0, "static": 2.0, "dynamic": 1.0}

    def race(candidates: Sequence[Any]) -> list[float]:
        return [1.0 + 0.1 * sum(not plan.dynamic for plan in c.plans.values()) for c in candidates]

    found = quantize(uneven, AUTO, BATCHES, clock=_clock(times), race=race)
    assert {layer.mode for layer in found.layers} == {"static"}
    why = {layer.name: layer.why for layer in found.layers}
    assert why["stem"] == "the fastest"
    assert why["fc1"] == "the whole file, which is faster than with dynamic here"


def test_auto_for_avx2_takes_all_of_uint8_only_where_the_budget_asks(uneven: nn.Module) -> None:
    times = {FLOAT: 3.0, "static": 1.0, "static u8": 1.5, "dynamic": 1.2, "dynamic u8": 1.7}
    seven = quantize(
        uneven,
        Recipe("a", activations="auto", error_budget=0.9, reduce_range=True),
        BATCHES,
        clock=_clock(times),
    )
    assert {plan.weight.qmax for plan in seven.plans.values()} == {63}
    budget = 0.5 * seven.logit_error
    held = quantize(
        uneven,
        Recipe("a", activations="auto", error_budget=budget, reduce_range=True),
        BATCHES,
        clock=_clock(times),
    )
    assert held.logit_error <= budget
    assert {plan.weight.qmax for plan in held.plans.values()} == {63, 127}
    assert any(layer.mode.endswith(" u8") for layer in held.layers)


def test_auto_without_a_clock_or_budget_is_refused(uneven: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'auto' chooses by the time of each layer: call vitzoo\.quantize"):
        quantize(uneven, AUTO, BATCHES)
    with pytest.raises(ValueError, match="needs an error_budget"):
        Recipe("a", activations="auto")
    with pytest.raises(ValueError, match="uniform quantizers of 8 bits"):
        Recipe("a", activations="auto", error_budget=0.1, weight_bits=4)
    with pytest.raises(ValueError, match="smooth is 'some', expected 0 to 1, or 'auto'"):
        Recipe("a", smooth="some")
