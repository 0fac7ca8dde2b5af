from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitzoo.layers import DeformConv2d
from vitzoo.testing import image, relative_difference


def _layer(spread: float = 0.2) -> DeformConv2d:
    torch.manual_seed(0)
    layer = DeformConv2d(6, 10, 2)
    torch.nn.init.normal_(layer.conv_offset.weight, std=spread)
    torch.nn.init.normal_(layer.conv_offset.bias, std=1.0)
    return layer


def _sample(x: Tensor, row: float, col: float) -> Tensor:
    """Bilinear sample of a map (C, H, W); corners outside count as zero."""
    top, left = math.floor(row), math.floor(col)
    out = x.new_zeros(x.shape[0])
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
            out += x[:, i, j] * (1 - abs(row - i)) * (1 - abs(col - j))
    return out


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=["even", "odd"])
def test_deform_conv_equals_its_definition(size: tuple[int, int]) -> None:
    layer = _layer().double()
    x = image((2, 6, *size)).double()
    offsets = layer.offsets(x)
    assert (
        relative_difference(offsets, F.conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, stride=2))
        < 1e-12
    )
    expected = torch.empty(2, 10, size[0] // 2, size[1] // 2, dtype=torch.float64)
    for b, i, j in itertools.product(range(2), range(size[0] // 2), range(size[1] // 2)):
        out = layer.bias.detach().clone()
        for tap, (r, c) in enumerate(itertools.product(range(2), range(2))):
            dy, dx = offsets[b, 2 * tap : 2 * tap + 2, i, j].tolist()
            out += layer.weight[:, :, r, c] @ _sample(x[b], 2 * i + r + dy, 2 * j + c + dx)
        expected[b, :, i, j] = out.detach()
    assert float(offsets.detach().abs().max()) > 2, "some samples should lie outside the map"
    assert relative_difference(layer(x), expected) < 1e-12


def test_a_new_layer_is_an_ordinary_convolution() -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(6, 10, 2)
    x = image((2, 6, 7, 9))
    assert relative_difference(layer(x), F.conv2d(x, layer.weight, layer.bias, stride=2)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_displaces_in_float32(dtype: torch.dtype) -> None:
    layer = _layer().to(dtype)
    x = image((2, 6, 64, 64)).to(dtype)
    assert layer.offsets(x).dtype == torch.float32
    out = layer(x)
    assert out.dtype == dtype
    # the float32 result of the same rounded weights, rounded once
    assert relative_difference(out, layer.float()(x.float()).to(dtype)) < 1e-6


def test_autocast_leaves_it_in_float32() -> None:
    layer = _layer()
    x = image((2, 6, 64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.float()(x))
        assert layer(x).dtype == torch.float32


def test_meta_device_gives_the_shape() -> None:
    layer = DeformConv2d(6, 10, 2, device="meta")
    assert layer(torch.empty(2, 6, 7, 9, device="meta")).shape == (2, 10, 3, 4)


def test_a_map_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="a 1x4 map is smaller than the kernel, 2"):
        _layer()(image((1, 6, 1, 4)))
