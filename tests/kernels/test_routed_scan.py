"""Several scans along routes of one input: against one selective scan a route in torch operations, with copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vitzoo.kernels.common import native, routed_scan, scan_support
from vitzoo.kernels.common.scan_support import BACKWARD_ITEMS, TILE, is_divided, part_channels
from vitzoo.kernels.selective_scan.reference import selective_scan_reference
from vitzoo.testing import FLOORS, assert_close_to_reference, image

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")


@dataclass(frozen=True)
class Case:
    batch: int
    dim: int
    height: int
    width: int
    dstate: int
    routes: tuple[int, ...]
    shared: bool = True
    groups: int = 0
    has_D: bool = True
    has_z: bool = True
    has_delta_bias: bool = True
    delta_softplus: bool = True


CASES = {
    "vim": Case(2, 37, 1, 67, 5, (0, 2), shared=False),
    "vim_shared": Case(3, 20, 1, 131, 16, (0, 2)),
    "vim_long": Case(1, 18, 1, 300, 3, (0, 2), shared=False),
    "vmamba": Case(2, 40, 7, 5, 1, (0, 1, 2, 3), has_z=False),
    "vmamba_long": Case(1, 17, 13, 23, 2, (0, 1, 2, 3)),
    "one_route": Case(2, 6, 3, 4, 4, (3,), has_D=False, has_delta_bias=False, delta_softplus=False),
    "groups": Case(2, 24, 4, 6, 3, (1, 2), groups=2),
    "one_token": Case(3, 5, 1, 1, 2, (0, 1, 2, 3)),
    "columns_only": Case(1, 9, 16, 8, 17, (1, 1, 3), shared=False, has_z=False),
}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    seqlen, count = case.height * case.width, len(case.routes)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(of)

    def each(*size: int, of: torch.dtype = dtype, number: int = count) -> list[Tensor]:
        return [normal(*size, of=of) for _ in range(number)]

    full = (case.batch, case.dim, seqlen)
    rows = (case.batch, *([case.groups] if case.groups else []), case.dstate, seqlen)
    delta = each(*full)
    if not case.delta_softplus:
        delta = [0.3 * x.abs() for x in delta]
    return {
        "u": each(*full, number=1 if case.shared else count),
        "delta": delta,
        "A": [-x.exp() for x in each(case.dim, case.dstate, of=wide)],
        "B": each(*rows),
        "C": each(*rows),
        "D": each(case.dim, of=wide) if case.has_D else None,
        "z": normal(*full) if case.has_z else None,
        "delta_bias": [x - 2 for x in each(case.dim, of=wide)] if case.has_delta_bias else None,
        "delta_softplus": case.delta_softplus,
        "routes": case.routes,
        "width": case.width,
    }


def order(route: int, height: int, width: int) -> Tensor:
    """Return the pixel of every token of a route."""
    pixels = torch.arange(height * width).view(height, width)
    pixels = (pixels.T if route & 1 else pixels).flatten()
    return pixels.flip(0) if route & 2 else pixels


def reference(inputs: dict[str, Any]) -> Tensor:
    total: Any = 0
    u, width = inputs["u"], inputs["width"]
    wide = torch.promote_types(u[0].dtype, torch.float32)
    for i, route in enumerate(inputs["routes"]):
        pixels = order(route, u[0].shape[-1] // width, width)
        x = u[i if len(u) > 1 else 0][..., pixels].to(wide)
        rest = [inputs[k][i][..., pixels] for k in ("B", "C")]
        y, _ = selective_scan_reference(
            x,
            inputs["delta"][i][..., pixels],
            inputs["A"][i],
            *rest,
            None if inputs["D"] is None else inputs["D"][i],
            delta_bias=None if inputs["delta_bias"] is None else inputs["delta_bias"][i],
            delta_softplus=inputs["delta_softplus"],
        )
        total = total + y[..., torch.argsort(pixels)]
    if inputs["z"] is not None:
        total = total * torch.nn.functional.silu(inputs["z"].to(wide))
    return total.to(u[0].dtype)


def flat(values: dict[str, Any]) -> dict[str, Tensor]:
    out = {}
    for name in NAMES:
        value = values[name]
        for i, x in enumerate(value if isinstance(value, list) else [value]):
            if x is not None:
                out[f"{name} {i}"] = x
    return out


def by_autograd(inputs: dict[str, Any]) -> dict[str, Tensor]:
    def leaf(x: Any) -> Any:
        if isinstance(x, list):
            return [leaf(y) for y in x]
        return x.clone().requires_grad_() if isinstance(x, Tensor) else x

    leaves = {k: leaf(v) for k, v in inputs.items()}
    out = reference(leaves)
    out.backward(image(out.shape, 7).to(out.dtype))
    return {"out": out.detach()} | {k: v.grad for k, v in flat(leaves).items()}


def by_routes(inputs: dict[str, Any]) -> dict[str, Tensor]:
    out = routed_scan.forward(**inputs)
    gradients = routed_scan.backward(image(out.shape, 7).to(out.dtype), **inputs)
    return {"out": out} | flat(gradients._asdict())


def assert_as_close_as_the_reference(inputs: dict[str, Any], floor: float) -> None:
    wide = {
        k: [x.double() for x in v] if isinstance(v, list) else v.double() if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    ours, theirs, exact = by_routes(inputs), by_autograd(inputs), by_autograd(wide)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if not exact[name].any():  # A of a single token
            assert float(value.abs().max()) < 1e-6, name
        else:
            assert_close_to_reference(value, theirs[name], exact[name], floor, name)


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_routes_are_as_close_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_as_close_as_the_reference(make_inputs(case, dtype), FLOORS[dtype])


def test_views_and_token_major_memory_are_read_in_place() -> None:
    inputs = make_inputs(Case(2, 17, 13, 23, 2, (0, 1, 2, 3)))
    expected = by_routes(inputs)
    stacked = torch.stack(inputs["delta"], dim=1)
    views = inputs | {
        "u": [inputs["u"][0].transpose(1, 2).contiguous().transpose(1, 2)],
        "delta": list(stacked.unbind(1)),
        "z": inputs["z"].repeat(1, 2, 1)[:, : inputs["z"].shape[1]],
    }
    assert not any(x.is_contiguous() for x in (*views["u"], views["z"]))
    for name, value in by_routes(views).items():
        assert torch.equal(value, expected[name]), name


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads, results = make_inputs(CASES["vim"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_routes(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


# Divided along the tokens: L just long enough, pieces of 768 tokens with a short last one (of 8 at most), two tiles of
# a work item, columns that pieces cut, lanes without a channel, groups, and none of the options. With 8 threads they
# share a tile, with one each tile is a thread's own.
DIVIDED = {
    "vim_short": Case(1, 4, 1, 1024, 1, (0, 2), shared=False),
    "vim_long": Case(1, 8, 1, 4100, 5, (0, 2)),
    "tiles": Case(1, 24, 1, 1500, 16, (0, 2), shared=False),
    "vmamba": Case(1, 17, 33, 37, 2, (0, 1, 2, 3), has_z=False),
    "batch": Case(2, 13, 30, 43, 3, (0, 1, 2, 3), groups=1),
    "groups": Case(1, 12, 61, 21, 4, (1, 2), groups=4, shared=False),
    "plain": Case(
        1, 7, 1279, 1, 2, (3,), has_D=False, has_z=False, has_delta_bias=False, delta_softplus=False
    ),
}


@pytest.fixture
def _few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_support, "MOST_PIECES", 8)


@pytest.mark.usefixtures("_few_pieces")
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("case", DIVIDED.values(), ids=DIVIDED)
def test_pieces_of_the_tokens_join(case: Case, threads: int) -> None:
    assert is_divided(case.batch * max(case.groups, 1) * -(-case.dim // 16), case.height * case.width)
    inputs, before = make_inputs(case), torch.get_num_threads()
    # slow decays, so that what enters a piece is felt in the last of them
    inputs["A"] = [0.01 * x for x in inputs["A"]]
    torch.set_num_threads(threads)
    try:
        assert_as_close_as_the_reference(inputs, FLOORS[torch.float32])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_few_pieces")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", DIVIDED.values(), ids=DIVIDED)
def test_the_number_of_threads_changes_no_bit_of_a_divided_scan(
    case: Case, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("baseline", "avx2", "avx512")
    if sets.index(isa) > sets.index(native.cpu_isa() or "baseline"):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("VITZOO_CPU_ISA", isa)
    inputs, threads, results = make_inputs(case, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(by_routes(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 5), (16, 16), (13, 41)], ids=str)
def test_divided_scans_of_any_length_equal_whole_ones(
    tokens: tuple[int, int], threads: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ("baseline", "avx2", "avx512")
    if sets.index(isa) > sets.index(native.cpu_isa() or "baseline"):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setenv("VITZOO_CPU_ISA", isa)
    inputs = make_inputs(Case(1, 19, *tokens, 5, (0, 1, 2, 3)), torch.float64)
    whole, before = by_routes(inputs), torch.get_num_threads()
    monkeypatch.setattr(scan_support, "LONG", 1)
    torch.set_num_threads(threads)
    try:
        divided = by_routes(inputs)
    finally:
        torch.set_num_threads(before)
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 4, "routes": (0, 2, 0, 2)}, "width 4 does not divide 35 tokens"),
        ({"routes": (0, 1, 2, 4)}, "route 4 is not 0, 1, 2 or 3"),
        ({"D": [torch.ones(40)]}, "D has 1 entries for 4 routes"),
    ],
    ids=["width", "route", "count"],
)
def test_the_native_operator_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    inputs = make_inputs(CASES["vmamba"])
    with pytest.raises(RuntimeError, match=message):
        routed_scan.forward(**inputs | changes)


@pytest.mark.parametrize("size", [(1, 1, 384, 16), (8, 1, 768, 16), (2, 4, 192, 1), (1, 1, 18, 64)], ids=str)
def test_partial_sums_are_no_larger_than_the_input(size: tuple[int, int, int, int]) -> None:
    batch, groups, channels, dstate = size
    piece = part_channels(batch, groups, channels, dstate)
    parts = -(-channels // piece)
    assert piece % TILE == 0
    assert parts == 1 or 2 * parts * dstate <= channels
    assert parts == 1 or batch * groups * (parts - 1) < BACKWARD_ITEMS
