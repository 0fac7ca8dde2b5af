"""Result files as `vitzoo bench` writes them, of measurements that nobody made, for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitzoo.benchmark.results import SCHEMA_VERSION

SCHEMA = {"schema_version": SCHEMA_VERSION, "run": "r"}


def header(cpu: str = "Some CPU", **more) -> dict:
    machine = {"cpu": {"model": cpu, "torch_capability": "AVX2", "flags": ["avx2"], "usable_cores": 2}}
    machine |= {"gpus": [], "platform": "Linux", "versions": {"torch": "2.14.1"}, "commit": "abc"}
    machine |= {"load": [0.1, 0.2, 0.3], "time": "2026-11-29T00:00:00+00:00"}
    measure = {"seconds": 2.0, "min_rounds": 10}
    return {"kind": "header", **SCHEMA, "machine": machine | more, "measure": measure}


def row(model: str, speed: float, label: str | None = None, size: int | None = None, **more) -> dict:
    made = {"kind": "result", **SCHEMA, "model": model, "label": label or model, "tag": None, "mode": "infer"}
    made |= {"runtime": "eager", "precision": "float32", "layout": "contiguous", "attention": "default"}
    made |= {"device": "cpu", "threads": 2, "requested_img_size": size, "infer_img_size": size or 224}
    made |= {"requested_batch_size": 1, "infer_batch_size": 1, "kwargs": {}, "infer_samples_per_sec": speed}
    made |= {"infer_step_time": 1e3 / speed, "p50_ms": 1e3 / speed, "p90_ms": 1.1e3 / speed}
    made |= {"p99_ms": 1.2e3 / speed, "iqr_ms": 50 / speed, "rounds": 20, "samples_s": [1 / speed] * 20}
    made |= {"infer_gmacs": 4.5, "param_count": 22.0, "peak_mem_mib": 150.0, "backends": {"scan": ["cpu"]}}
    return made | more


def claim(**more) -> dict:
    made = {"kind": "claim", **SCHEMA, "comparison": "c", "text": "EViT is faster", "source": "its paper"}
    made |= {
        "subject": "a",
        "baseline": "b",
        "expected": 1.5,
        "tolerance": 0.9,
        "figure": "speed",
        "img_size": None,
        "threads": 2,
    }
    made |= {
        "precision": "float32",
        "device": "cpu",
        "requested_batch_size": 1,
        "runtimes": ["eager", "eager"],
    }
    return made | {"measured": 1.31, "low": 1.2, "high": 1.4, "verdict": "does not hold here"} | more


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SWEEP = {224: (40.0, 90.0), 512: (9.0, 12.0), 768: (4.2, 3.9), 1024: (2.4, 1.5)}
ZOO = {
    "litv2_small": (14, 3.7),
    "litv2_medium": (8, 7.5),
    "litv2_base": (4.6, 13.2),
    "evit_small_patch16_224": (22, 3.0),
    "evit_small_patch16_224.keep0.5_fuse_in1k": (27, 2.3),
    "deit_tiny_patch16_224": (60, 1.26),
    "deit_small_patch16_224": (17, 4.6),
    "cvt_13": (9.6, 4.5),
    "cvt_21": (6.1, 7.1),
    "swin_tiny_patch4_window7_224": (11.4, 4.5),
    "convnext_tiny": (13.1, 4.5),
    "nextvit_small": (9.9, 5.8),
    "pvt_v2_b2": (8.3, 4.0),
    "efficientvit_m2": (210, 0.2),
    "efficientvit_m5": (120, 0.52),
    "mobilenetv3_large_100": (95, 0.22),
    "twins_svt_small": (14.8, 2.9),
    "layer:hilo": (900, 0.1),
}


def rich(folder: Path) -> list[Path]:
    """Write two files with something for every chart: a zoo on two machines, a sweep, int8, a claim, an error."""
    zoo = [row(name, speed, infer_gmacs=gmacs) for name, (speed, gmacs) in ZOO.items()]
    int8 = [
        row(n, s * f, infer_gmacs=g, precision="int8", weight_mib=23.0)
        for (n, (s, g)), f in zip(list(ZOO.items())[:4], (1.9, 1.6, 2.2, 0.8), strict=True)
    ]
    sweep = []
    for size, (scan, vit) in SWEEP.items():
        for model, speed, peak in (("vim_tiny_patch16_224", scan, 40), ("deit_tiny_patch16_224", vit, 20)):
            label = {"v": "Vim-Ti", "d": "DeiT-Ti"}[model[0]]
            memory = peak * (size / 224) ** (2 if model[0] == "v" else 3.5)
            sweep.append(
                row(model, speed, label, size, infer_gmacs=1.3 * (size / 224) ** 2, peak_mem_mib=memory)
            )
    bad = row("vim_base_patch16_224", 1.0, error="MemoryError: <b>no</b> room", error_kind="out of memory")
    fast = [row(name, 3.1 * speed, infer_gmacs=gmacs) for name, (speed, gmacs) in list(ZOO.items())[:9]]
    return [
        write(folder / "laptop.jsonl", header(load=[3.0, 1, 1]), *zoo, *int8, *sweep, bad, claim()),
        write(folder / "server.jsonl", header("Faster CPU with a Long Name"), *fast),
    ]


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """Give what makes result files, and the figures in the rich ones."""
    return SimpleNamespace(header=header, row=row, claim=claim, write=write, rich=rich, zoo=ZOO, sweep=SWEEP)
