"""Reading the authors' files: wrappers, training state, damage, and pickles that want to act."""

import argparse
import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import vitzoo
from vitzoo.checkpoint import (
    CheckpointError,
    misfit,
    read_checkpoint,
    read_file,
    resize_pos_grid,
    strip_prefix,
)

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


class Config(dict):  # stands for yacs.config.CfgNode: a dict subclass with attributes
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen = True


class Schedule:
    def __init__(self):
        self.steps = [1, 2]


class Slotted:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 3


class Acts:
    def __reduce__(self):
        return (os.system, ("touch acted",))


class Evals:
    def __reduce__(self):
        return (eval, ("open('acted', 'w')",))


def _equal(state_dict: dict) -> bool:
    return set(state_dict) == set(WEIGHTS) and all(torch.equal(state_dict[k], v) for k, v in WEIGHTS.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "key"),
    [
        (WEIGHTS, ""),
        (collections.OrderedDict(WEIGHTS), ""),
        ({"model": WEIGHTS, "epoch": 299}, "model"),
        ({"state_dict": WEIGHTS}, "state_dict"),
        ({"model": {f"module.{k}": v for k, v in WEIGHTS.items()}}, "model"),
        ({"model": WEIGHTS, "model_ema": {k: v + 1 for k, v in WEIGHTS.items()}}, "model"),
        ({"model_ema": WEIGHTS}, "model_ema"),
        ({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, out=Path("x"))}, "model"),
        ({"model": WEIGHTS, "config": Config(MODEL=Config(NAME="x"))}, "model"),
        ({"model": WEIGHTS, "lr_scheduler": Schedule(), "optimizer": {"state": {0: {"step": 3}}}}, "model"),
        ({"model": WEIGHTS, "meter": Slotted()}, "model"),
        ({"model": WEIGHTS, "best": np.float64(81.2), "history": np.arange(3)}, "model"),
    ],
    ids=[
        "flat",
        "ordered",
        "model",
        "state_dict",
        "ddp",
        "ema beside",
        "ema only",
        "namespace",
        "config",
        "object",
        "slots",
        "numpy",
    ],
)
def test_published_forms_load(tmp_path: Path, content: object, key: str, zipped: bool) -> None:
    path = tmp_path / "authors.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert _equal(found.state_dict)
    assert found.key == key


def test_ema_is_taken_on_request(tmp_path: Path) -> None:
    path = tmp_path / "authors.pth"
    torch.save({"model": {k: v + 1 for k, v in WEIGHTS.items()}, "model_ema": WEIGHTS}, path)
    assert _equal(read_checkpoint(path, use_ema=True).state_dict)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert _equal(read_checkpoint(tmp_path / "w.safetensors").state_dict)
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:40])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_unknown_classes_are_inert(tmp_path: Path) -> None:
    path = tmp_path / "authors.pth"
    torch.save({"model": WEIGHTS, "lr_scheduler": Schedule()}, path)
    scheduler = read_file(path)["lr_scheduler"]
    assert type(scheduler) is collections.OrderedDict
    assert scheduler.steps == [1, 2]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("bad", "name"), [(Acts(), "system"), (Evals(), "eval")], ids=["os.system", "eval"])
def test_acting_pickles_are_refused(tmp_path, monkeypatch, bad, name, zipped) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "extra": bad}, "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"refused: its pickle asks for \w+\.{name}"):
        read_checkpoint("bad.pth")
    assert not Path("acted").exists()


def test_a_bare_pickle_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.pth").write_bytes(pickle.dumps(Acts()))
    with pytest.raises(CheckpointError):
        read_checkpoint("bad.pth")
    assert not Path("acted").exists()


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_files_say_so(tmp_path: Path, keep: float, zipped: bool) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(
        {"model": {**WEIGHTS, "b": torch.randn(100, 100)}}, whole, _use_new_zipfile_serialization=zipped
    )
    data = whole.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(CheckpointError, match=r"cut\.pth .*(not a readable checkpoint|refused)"):
        read_checkpoint(path)


def test_missing_and_empty_files() -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at nowhere\.pth"):
        read_checkpoint("nowhere.pth")


def test_file_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "best": 81.0}, tmp_path / "log.pth")
    with pytest.raises(CheckpointError, match="has no weights under any of model"):
        read_checkpoint(tmp_path / "log.pth")


def test_prefixes_go_only_where_every_name_has_them() -> None:
    assert set(strip_prefix({"module.a": WEIGHTS["a.bias"], "b": WEIGHTS["a.bias"]})) == {"module.a", "b"}
    both = {"backbone.a": WEIGHTS["a.bias"], "decode_head.b": WEIGHTS["a.bias"]}
    assert set(strip_prefix(both)) == {"a"}


def test_resize_pos_grid_is_plain_bicubic() -> None:
    pos = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    grid = pos.reshape(1, 3, 4, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False)
    out = resize_pos_grid(pos, (3, 4), (6, 5))
    torch.testing.assert_close(out, expected.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="12 rows, a 3x5 grid needs 15"):
        resize_pos_grid(pos, (3, 5), (6, 5))


def test_misfit_names_what_differs() -> None:
    own = {**WEIGHTS, "c": torch.zeros(1)}
    lines = misfit({"a.weight": torch.zeros(3, 3), "a.bias": torch.zeros(2), "d": torch.zeros(1)}, own)
    assert lines == ["missing: c", "left over: d", "shape: a.weight (3, 3) instead of (2, 3)"]
    assert misfit(WEIGHTS, WEIGHTS) == []


def test_unknown_model_lists_close_matches() -> None:
    with pytest.raises(vitzoo.UnknownModelError, match="vim_tiny_patch16_224"):
        vitzoo.create_model("vim_tiny_patch16_22")
    with pytest.raises(RuntimeError, match="unknown pretrained tag"):
        vitzoo.create_model("mobilenetv3_large_100.nothing")
