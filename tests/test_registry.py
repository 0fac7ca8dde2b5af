"""The registry: what it lists, what it says of a model, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import timm

import vitzoo
from vitzoo import registry
from vitzoo.registry import Family, Published, UnknownModelError

FAMILIES = registry.families()


def _family(**changes) -> Family:
    family = Family("trial", ("hilo",), "", "", "", "", {"vitzoo_trial_model": Published()})
    return dataclasses.replace(family, **changes)


@pytest.mark.parametrize("category", vitzoo.CATEGORIES)
def test_a_category_lists_the_models_of_its_families(category: str) -> None:
    expected = {m for f in FAMILIES if category in f.categories for m in f.models}
    assert vitzoo.list_models(category=category) == sorted(expected)
    assert expected


def test_filters_combine() -> None:
    assert vitzoo.list_models("*base*", family="cvt") == []
    assert vitzoo.list_models("vim_tiny*", category="scan") == [
        "vim_tiny_patch16_224",
        "vim_tiny_patch16_stride8_224",
    ]
    both = vitzoo.list_models(["cvt_13", "cvt_21"])
    assert both == ["cvt_13", "cvt_21"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"category": "scans"}, "unknown category 'scans'; known: hierarchical"),
        ({"family": "litv"}, "unknown family 'litv'; close: litv2"),
    ],
    ids=["category", "family"],
)
def test_unknown_category_or_family(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitzoo.list_models(**kwargs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_model_listed_exists_once(family: Family) -> None:
    assert len(family.models) >= 1
    assert set(family.categories) <= set(vitzoo.CATEGORIES)
    for name in family.models:
        assert timm.is_model(name)
        assert sum(name in other.models for other in FAMILIES) == 1
    for tag in family.tags:
        assert tag in timm.models.get_arch_pretrained_cfgs(tag.partition(".")[0]), tag


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_info_of_a_family(family: Family) -> None:
    name = next(iter(family.models))
    info = vitzoo.model_info(name)
    assert (info.family, info.categories, info.origin) == (family.name, family.categories, family.origin)
    assert info.params == sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    figures = family.models[name]
    assert (info.gmacs, info.top1) == (figures.gmacs, figures.top1)
    assert figures.source or (figures.gmacs is None and figures.top1 is None), "a figure without a source"
    assert all(text for text in (info.paper, info.code, info.code_license, info.weights_license))


def test_a_tag_is_ignored_by_info() -> None:
    assert vitzoo.model_info("cvt_13") == vitzoo.model_info(
        next(c.name for c in vitzoo.model_info("cvt_13").checkpoints)
    )


@pytest.mark.parametrize(
    ("name", "close"),
    [("vim_tiny_patch16_225", "vim_tiny_patch16_224"), ("litv2_smal", "litv2_small"), ("cvt13", "cvt_13")],
)
def test_an_unknown_name_gets_close_matches(name: str, close: str) -> None:
    for function in (vitzoo.create_model, vitzoo.model_info):
        with pytest.raises(UnknownModelError, match=close):
            function(name)


def test_an_unknown_tag_gets_the_known_ones() -> None:
    with pytest.raises(UnknownModelError, match=r"unknown pretrained tag 'nothing'.*keep0\.7_fuse_in1k"):
        vitzoo.create_model("evit_small_patch16_224.nothing")


def test_a_timm_model_outside_the_zoo() -> None:
    with pytest.raises(UnknownModelError, match="outside vitzoo's categories"):
        vitzoo.model_info("resnet18")
    assert vitzoo.create_model("resnet18", num_classes=3, device="meta").num_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ("hilo", "fast")}, r"unknown categories \['fast'\]"),
        ({"models": {"resnet18": Published()}}, "already registered with timm; vitzoo never overwrites"),
        ({"models": {"cvt_13": Published()}}, "already in family 'cvt'"),
        ({"models": {"swin_tiny_patch4_window7_224": Published()}, "origin": "timm"}, "in family 'swin'"),
    ],
    ids=["category", "name of timm", "name of ours", "two families of timm"],
)
def test_a_family_that_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.register_family(_family(**changes))
    assert registry.family_of("vitzoo_trial_model") is None
    assert "trial" not in [f.name for f in registry.families()]


@pytest.mark.parametrize(
    ("name", "top1"),
    [("deit_small_patch16_224", 79.9), ("swin_tiny_patch4_window7_224", 81.2), ("convnext_tiny", 82.1)],
)
def test_published_accuracy_of_timms_models_names_its_source(name: str, top1: float) -> None:
    figures = vitzoo.model_info(name)
    assert figures.top1 == top1
    assert "README" in figures.source


def test_every_published_accuracy_has_a_model_and_a_source() -> None:
    known = [(m, p) for f in registry.families() for m, p in f.models.items() if p.top1 is not None]
    assert len(known) > 40
    for name, figures in known:
        assert 50 < figures.top1 < 90, name
        assert figures.source, name
