"""The token mixers: against loops over tokens and against the two directions taken one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.kernels.selective_scan.reference import selective_scan_reference
from vitzoo.layers.norm import RMSNorm, at_least_float32
from vitzoo.layers.ssm import BidirectionalMamba
from vitzoo.testing import relative_difference


def _mixer(dim: int = 24, **kwargs) -> BidirectionalMamba:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(dim, **kwargs).double()
    with torch.no_grad():
        for p in (mixer.A_log, mixer.A_b_log, mixer.D, mixer.D_b):
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def _direction(mixer: BidirectionalMamba, x: Tensor, z: Tensor, suffix: str) -> Tensor:
    """One direction as published: its own scan, gated; x and z are (B, D, L)."""
    conv = getattr(mixer, f"conv1d{suffix}")
    u = F.silu(F.conv1d(x, conv.weight, conv.bias, padding=3, groups=x.shape[1])[..., : x.shape[-1]])
    rank, states = mixer.dt_rank, mixer.d_state
    params = getattr(mixer, f"x_proj{suffix}")(u.transpose(1, 2)).transpose(1, 2)
    dt, b, c = params.split((rank, states, states), dim=1)
    dt_proj = getattr(mixer, f"dt_proj{suffix}")
    rates = -torch.exp(mixer.A_b_log if suffix else mixer.A_log)
    skip = mixer.D_b if suffix else mixer.D
    return selective_scan_reference(
        u, dt_proj.weight @ dt, rates, b, c, skip, z, dt_proj.bias, delta_softplus=True
    )[0]


def _as_published(mixer: BidirectionalMamba, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    ahead = _direction(mixer, x, z, "")
    back = _direction(mixer, x.flip(-1), z.flip(-1), "_b").flip(-1)
    return mixer.out_proj(((ahead + back) / 2).transpose(1, 2))


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_mixer_and_gradients_equal_the_published_form(tokens: int) -> None:
    mixer = _mixer()
    x = torch.randn(2, tokens, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.randn_like(x)
    found = []
    for function in (mixer, lambda x: _as_published(mixer, x)):
        mixer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (y * weight).sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in mixer.parameters())])
    names = ["output", "input", *(k for k, _ in mixer.named_parameters())]
    for name, ours, reference in zip(names, *found, strict=True):
        assert relative_difference(ours, reference) < 1e-10, name


def test_mixer_turns_with_its_directions() -> None:
    mixer = _mixer()
    turned = _mixer()
    state = mixer.state_dict()
    swap = {"A_log": "A_b_log", "A_b_log": "A_log", "D": "D_b", "D_b": "D"}
    for key in state:
        module, dot, rest = key.partition(".")
        if module.startswith(("conv1d", "x_proj", "dt_proj")):
            other = module[:-2] if module.endswith("_b") else f"{module}_b"
            swap[key] = f"{other}{dot}{rest}"
    turned.load_state_dict({swap.get(k, k): v for k, v in state.items()})
    x = torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(turned(x.flip(1)), mixer(x).flip(1))


def test_initial_steps_and_rates_are_mambas() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(192)
    for proj in (mixer.dt_proj, mixer.dt_proj_b):
        steps = F.softplus(proj.bias)
        assert 0.99e-3 < steps.min() < 2e-3
        assert 0.05 < steps.max() < 1.01e-1
        # log-uniform: the logarithm's mean is half-way
        assert abs(steps.log10().mean() + 2.0) < 0.1
        assert proj.weight.abs().max() <= 12**-0.5
    torch.testing.assert_close(-mixer.A_b_log.exp(), -torch.arange(1.0, 17.0).expand(384, 16))
    assert torch.equal(mixer.D_b, torch.ones(384))


def test_scan_keeps_float32_rates_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitzoo.layers import ssm

    seen: dict[str, Any] = {}

    def spy(u: Tensor, z: Tensor, *scans: Tensor, **kwargs: Any) -> Tensor:
        seen.update(u=u, scans=scans)
        return u

    monkeypatch.setattr(ssm, "bidirectional_selective_scan", spy)
    mixer = _mixer().to(torch.bfloat16)
    mixer(torch.randn(1, 4, 24, dtype=torch.bfloat16))
    assert seen["u"].dtype == torch.bfloat16
    for first, log in ((0, mixer.A_log), (6, mixer.A_b_log)):
        _, A, _, _, D, bias = seen["scans"][first : first + 6]
        assert torch.equal(A, -log.float().exp())
        assert D.dtype == bias.dtype == torch.float32


def test_rms_norm_reads_a_float32_residual_in_a_bfloat16_model() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 100
    norm = RMSNorm(8, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-5))
    half = norm.to(torch.bfloat16)(x)
    assert half.dtype == torch.bfloat16
    weight = norm.weight.float()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.equal(half, expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = at_least_float32(torch.tensor([1.5], dtype=dtype))
    assert x.dtype == expected
    assert x.item() == 1.5
