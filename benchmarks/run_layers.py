"""Time layers that are built on the operators against other formulations and layers of equal width, interleaved.

    python benchmarks/run_layers.py --threads 2 --output benchmarks/results/layers.json

HiLo (LITv2-S's stage 3: C 384, 12 heads, window 2, alpha 0.9) against the authors' formulation of it in torch
operations, whose output must be the same, and against timm's layers of equal width and head count: PVT's
spatial-reduction attention and Swin's window attention with its partition and merge. Projections are part of every
layer.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_kernels import SECONDS, summary, surroundings
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from vitzoo.benchmark.timing import compare
from vitzoo.layers import HiLo
from vitzoo.testing import relative_difference

DIM, HEADS = 384, 12


class PlainHiLo(nn.Module):
    """HiLo in torch operations as the paper's module is written: windows by copies, attention by the matrix.

    Source: Pan et al., arXiv 2205.13213, section 3.3; the order of operations is that of
        https://github.com/ziplab/LITv2 at 7501c8662991cad6db780b61fac0886b56a76588, hilo.py.
    """

    def __init__(self, layer: HiLo) -> None:
        super().__init__()
        self.layer = layer
        self.pool = nn.AvgPool2d(layer.window_size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * self.layer.scale).softmax(dim=-1) @ v

    def _hifi(self, x: Tensor) -> Tensor:
        layer, (batch, height, width, channels) = self.layer, x.shape
        s, heads = layer.window_size, layer.h_heads
        rows, cols = height // s, width // s
        x = x.reshape(batch, rows, s, cols, s, channels).transpose(2, 3)
        qkv = (
            layer.h_qkv(x).reshape(batch, rows * cols, -1, 3, heads, layer.head_dim).permute(3, 0, 1, 4, 2, 5)
        )
        x = self._attend(*qkv.unbind(0)).transpose(2, 3).reshape(batch, rows, cols, s, s, layer.h_dim)
        return layer.h_proj(x.transpose(2, 3).reshape(batch, height, width, layer.h_dim))

    def _lofi(self, x: Tensor) -> Tensor:
        layer, (batch, height, width, channels) = self.layer, x.shape
        q = layer.l_q(x).reshape(batch, height * width, layer.l_heads, layer.head_dim).permute(0, 2, 1, 3)
        pooled = self.pool(x.permute(0, 3, 1, 2)).reshape(batch, channels, -1).permute(0, 2, 1)
        kv = layer.l_kv(pooled).reshape(batch, -1, 2, layer.l_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
        x = self._attend(q, *kv.unbind(0)).transpose(1, 2).reshape(batch, height, width, layer.l_dim)
        return layer.l_proj(x)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, H*W, C) to the same shape."""
        x = x.unflatten(1, size)
        return torch.cat((self._hifi(x), self._lofi(x)), dim=-1).flatten(1, 2)


def layers(side: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return calls of the layers on a map of that side, (B, side*side, C), ours first."""
    torch.manual_seed(0)
    size = (side, side)
    ours = HiLo(DIM, HEADS, window_size=2, alpha=0.9, qkv_bias=True).eval()
    plain = PlainHiLo(ours)
    reduced = SpatialReductionAttention(DIM, HEADS, sr_ratio=2).eval()
    swin = {
        f"swin{' shifted' if shift else ''}": SwinTransformerBlock(
            DIM, size, num_heads=HEADS, window_size=7, shift_size=shift
        ).eval()
        for shift in (0, 3)
    }
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "hilo": lambda x: ours(x, size),
        "authors": lambda x: plain(x, size),
        "pvt": lambda x: reduced(x, size),
    }
    for name, block in swin.items():
        calls[name] = lambda x, block=block: block._attn(x.unflatten(1, size)).flatten(1, 2)  # type: ignore[misc]
    return calls


def measure(side: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Check that the two formulations of HiLo agree, then time all layers without gradients."""
    calls = layers(side)
    x = torch.randn(batch, side * side, DIM)
    with torch.inference_mode():
        difference = relative_difference(calls["hilo"](x), calls["authors"](x))
        if not difference < 1e-5:
            raise AssertionError(f"HiLo differs from the authors' formulation by {difference:.1e}")
        timed = {name: functools.partial(call, x) for name, call in calls.items()}
        times = compare(timed, seconds=SECONDS, min_rounds=rounds)
    rows = []
    for baseline in list(calls)[1:]:
        ratio = times["hilo"].ratio_to(times[baseline])
        row = {"layer": "hilo", "dim": DIM, "heads": HEADS, "side": side, "batch": batch, "dtype": "float32"}
        pair = {which: summary(times[which]) for which in ("hilo", baseline)}
        rows.append(row | {"pass": "forward", "baseline": baseline, "ratio": ratio, "times": pair})
        print(
            f"hilo {side}x{side} batch {batch}: {1e3 * times['hilo'].median:8.2f} ms, {baseline} "
            f"{1e3 * times[baseline].median:8.2f} ms, {ratio:5.2f}x",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and, at 14x14, 8")
    parser.add_argument("--output", type=Path, help="JSON file; default: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for side in (14, 56):
        for batch in args.batch or ((1, 8) if side == 14 else (1,)):
            rows += measure(side, batch, args.rounds)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": surroundings(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
