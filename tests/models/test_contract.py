"""What every model of ours keeps, walked over the registry; timm's own suite checks the rest."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.checkpoint import CheckpointError
from vitzoo.testing import image, relative_difference

OURS = [(f, m) for f in vitzoo.registry.families() if f.origin == "vitzoo" for m in f.models]
MODELS = [m for _, m in OURS]
TAGS = sorted(t for f in vitzoo.registry.families() if f.origin == "vitzoo" for t in f.tags)
FIRST = {f.name: next(iter(f.models)) for f, _ in OURS}


def _slow_unless_first(names: list[str]) -> list:
    return [n if n in FIRST.values() else pytest.param(n, marks=pytest.mark.slow) for n in names]


def _meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def _input(model: nn.Module, batch: int = 1) -> Tensor:
    channels, height, width = model.pretrained_cfg["input_size"]
    return image((batch, channels, height, width))


def _seeded(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model(name, **kwargs).eval()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_published(name: str) -> None:
    counted = sum(p.numel() for p in _meta(name).parameters())
    assert counted == vitzoo.model_info(name).params


@pytest.mark.parametrize("name", MODELS)
def test_meta_device_holds_everything(name: str) -> None:
    model = timm.create_model(name, device="meta")
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) > 10
    assert all(t.is_meta for t in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_are_type_errors(name: str) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        _meta(name, no_such_argument=1)


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_registered_and_set_their_arguments(name: str) -> None:
    tag = vitzoo.registry.tag_info(name)
    cfg = timm.models.get_arch_pretrained_cfgs(name.split(".")[0])[name]
    assert (tag.get is None) == bool(cfg.has_weights), "either code or a person can fetch the file"
    tagged, plain = _meta(name), _meta(name.split(".")[0], **tag.args)
    assert {k: tagged._model_args[k] for k in tag.args} == dict(tag.args)
    assert repr(tagged) == repr(plain)


@pytest.mark.parametrize("name", [t for t in TAGS if vitzoo.registry.tag_info(t).get])
def test_files_that_a_person_must_get_say_where(name: str) -> None:
    get = vitzoo.registry.tag_info(name).get
    with pytest.raises(CheckpointError, match="pretrained_cfg_overlay=") as error:
        timm.create_model(name, pretrained=True)
    assert get in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_info_is_complete(name: str) -> None:
    info = vitzoo.model_info(name)
    assert info.paper
    assert info.code.startswith("https://")
    assert info.code_license
    assert info.weights_license
    assert info.source
    assert set(info.categories) <= set(vitzoo.CATEGORIES)
    assert name in vitzoo.list_models(category=info.categories[0], family=info.family)


@pytest.mark.parametrize("family", FIRST)
def test_checkpoint_of_another_variant_names_the_one_it_fits(family: str, tmp_path: Path) -> None:
    tables: dict[str, list[str]] = {}
    for name in (m for f, m in OURS if f.name == family):
        shapes = str({k: tuple(v.shape) for k, v in _meta(name).state_dict().items()})
        tables.setdefault(shapes, []).append(name)
    if len(tables) < 2:
        pytest.skip(f"every variant of {family} has the same table")
    first, other = [names[0] for names in list(tables.values())[:2]]
    torch.manual_seed(0)
    torch.save({"model": timm.create_model(first).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"does not fit {other} .* It fits .*{first}"):
        vitzoo.create_model(other, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})


@pytest.mark.parametrize("family", FIRST)
def test_other_class_counts_load(family: str, tmp_path: Path) -> None:
    name, path = FIRST[family], tmp_path / "w.pth"
    overlay = {"file": str(path)}
    tuned = _seeded(name, num_classes=7)
    torch.save({"model": tuned.state_dict()}, path)
    x = _input(tuned)
    # the file's own count is taken unless another is asked for, which gets a fresh head
    same = vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    other = vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5).eval()
    with torch.no_grad():
        assert torch.equal(same(x), tuned(x))
        assert other(x).shape == (1, 5)
        torch.testing.assert_close(other.forward_features(x), tuned.forward_features(x))
    assert "state_dict" not in same.pretrained_cfg
    assert same.pretrained_cfg["file"] == str(path)


@pytest.mark.parametrize("family", FIRST)
def test_a_file_with_an_unknown_tensor_is_refused(family: str, tmp_path: Path) -> None:
    name = FIRST[family]
    state_dict = _seeded(name).state_dict() | {"surplus.weight": torch.zeros(3)}
    torch.save({"model": state_dict}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"left over: surplus\.weight"):
        vitzoo.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "w.pth")})


@pytest.mark.parametrize("name", _slow_unless_first(MODELS))
def test_layouts_and_bfloat16(name: str) -> None:
    model = _seeded(name, num_classes=10)
    x = _input(model)
    with torch.no_grad():
        expected = model(x)
        assert relative_difference(model(x.to(memory_format=torch.channels_last)), expected) < 1e-5
        half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        # 8 bits of mantissa through 12 to 24 layers of random weights; token pruning may keep other tokens
        assert relative_difference(half.float(), expected) < 0.2


@pytest.mark.parametrize("name", _slow_unless_first(MODELS))
def test_training_step_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name, num_classes=10, drop_rate=0.1, drop_path_rate=0.0).train()
    model(_input(model, batch=2)).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", _slow_unless_first(MODELS))
def test_checkpointed_gradients_are_equal(name: str) -> None:
    model = _seeded(name, num_classes=10).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # running statistics would be updated twice
    x = _input(model, batch=2)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_difference(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("name", _slow_unless_first(MODELS))
def test_pruned_taps_are_equal(name: str) -> None:
    model = _seeded(name, num_classes=10)
    x = _input(model)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert len(maps) == len(model.feature_info)
        last = len(maps) // 2
        model.prune_intermediate_layers([last], prune_norm=True)
        final, pruned = model.forward_intermediates(x, indices=[last])
    torch.testing.assert_close(pruned[0], maps[last])
    assert model.num_features == maps[last].shape[1]
    assert final.shape[0] == 1


@pytest.mark.parametrize("name", _slow_unless_first(MODELS))
def test_features_only(name: str) -> None:
    torch.manual_seed(0)
    model = vitzoo.create_model(name, features_only=True, out_indices=(0, -1)).eval()
    channels = model.feature_info.channels()
    with torch.no_grad():
        maps = model(_input(model))
    assert [m.shape[1] for m in maps] == channels
    assert all(m.ndim == 4 and torch.isfinite(m).all() for m in maps)


@pytest.mark.parametrize("family", FIRST)
def test_compiles_whole(family: str) -> None:
    model = _seeded(FIRST[family], num_classes=10)
    x = _input(model, batch=2)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_difference(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize("family", FIRST)
def test_saved_folder_round_trip(family: str, tmp_path: Path) -> None:
    model = _seeded(FIRST[family], num_classes=6, in_chans=4)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 4, *model.pretrained_cfg["input_size"][1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_entry_points_are_plain(name: str) -> None:
    entry = timm.models.model_entrypoint(name)
    assert list(inspect.signature(entry).parameters) == ["pretrained", "kwargs"]
    assert entry.__doc__
