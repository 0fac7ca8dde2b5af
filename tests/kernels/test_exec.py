"""The layer under the CUDA kernels: its host form computes what a GPU does, and finds what a GPU would hide."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vitzoo.kernels.common import native
from vitzoo.kernels.common.backends import BackendError, use_backend
from vitzoo.kernels.selective_scan import selective_scan
from vitzoo.kernels.selective_scan.inputs import SHAPES, make_inputs

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no extension: {native.why_not()}")

# csrc/common/exec_check.cuh
REVERSE, SHUFFLES, SUMS, UNWRITTEN, MISSING_BARRIER, EARLY_EXIT, TWO_BARRIERS, LONE_SHUFFLE, OVERRUN = range(
    9
)
ORDERS = ("forward", "reverse", "shuffled")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _run(what: int, blocks: int = 2, threads: int = 96, device: str = "cpu") -> Tensor:
    if device == "cuda" and native.cuda_why_not(torch.empty(1, device="cuda")) is not None:
        pytest.fail("the CUDA extension does not load on a machine with a GPU")
    out = torch.full((blocks, threads), -7.0, device=device)
    torch.ops.vitzoo_native.exec_check(what, out)
    return out.cpu()


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", request.param)
    return request.param


@pytest.mark.parametrize("device", DEVICES)
def test_a_barrier_makes_shared_memory_visible(order: str, device: str) -> None:
    expected = torch.arange(96).flip(0).float() + 1000 * torch.arange(3)[:, None]
    assert torch.equal(_run(REVERSE, 3, device=device), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_shuffles_read_the_right_lane(order: str, device: str) -> None:
    lane, warp = torch.arange(96) % 32, torch.arange(96) // 32
    up = torch.where(lane < 3, lane, lane - 3)
    down = torch.where(lane + 5 > 31, lane, lane + 5)
    expected = up + 100 * down + 10000 * (lane ^ 9) + 1000000 * warp
    assert torch.equal(_run(SHUFFLES, device=device), expected.float().expand(2, 96))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_sums_over_warps(order: str, device: str, threads: int) -> None:
    expected = sum(range(threads)) - 0.5 * sum(range(0, threads, 32))
    assert torch.equal(_run(SUMS, 2, threads, device), torch.full((2, threads), expected))


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    _run(REVERSE)
    assert _run(UNWRITTEN, 5).isnan().all()


def test_a_missing_barrier_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ORDERS:
        monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", name)
        found.append(_run(MISSING_BARRIER).nan_to_num(-1))
    assert not torch.equal(found[0], found[1])
    assert (found[0] == -1).any()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (EARLY_EXIT, r"thread 0 waits at the barrier of exec_check.cuh:\d+, thread 3 has left the kernel"),
        (TWO_BARRIERS, r"thread 0 waits at the barrier of .*, thread 1 waits at the barrier of"),
        (LONE_SHUFFLE, r"thread 0 waits at the shuffle of .*, thread 16 waits at the barrier of"),
    ],
    ids=["early_exit", "two_barriers", "lone_shuffle"],
)
def test_divergence_is_an_error(what: int, message: str, order: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _run(what)
    assert torch.isfinite(_run(SUMS)).all()  # the layer is as good as new


def test_a_block_of_half_a_warp_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a block of 48 threads is not of whole warps"):
        _run(SUMS, threads=48)


def test_an_unknown_order_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITZOO_CUDA_HOST_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="'sideways', not forward, reverse or shuffled"):
        _run(SUMS)


@pytest.mark.skipif(
    "libasan" not in os.environ.get("LD_PRELOAD", ""), reason="runs under make test-asan only"
)
def test_a_write_past_shared_memory_is_reported() -> None:
    code = (
        "import torch, vitzoo.kernels.common.native as n; assert n.why_not() is None, n.why_not(); "
        f"torch.ops.vitzoo_native.exec_check({OVERRUN}, torch.zeros(1, 32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_the_host_form_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SHAPES["tiny"])
    monkeypatch.delenv("VITZOO_CUDA_ON_CPU", raising=False)
    with use_backend("cuda"), pytest.raises(BackendError, match="it runs on CUDA devices only"):
        selective_scan(**inputs)
    monkeypatch.setenv("VITZOO_CUDA_ON_CPU", "1")
    assert "only when use_backend" in (native.cuda_why_not(inputs["u"]) or "")
    with use_backend("cuda"):
        torch.testing.assert_close(selective_scan(**inputs), selective_scan(**inputs))
    monkeypatch.setenv("VITZOO_CUDA_ON_CPU", "0")


def test_the_cuda_extension_loads_or_says_why_not() -> None:
    reason = native.cuda_extension_why_not()
    if reason is None:
        assert "vitzoo._C_cuda" in sys.modules
    else:
        assert "CUDA" in reason
        assert not reason.endswith(".")
