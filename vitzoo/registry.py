"""What vitzoo knows of each model besides its code: family, categories, paper, licences, published figures.

Constructors live in timm's registry, where `timm.models.register_model` puts them. This file keeps the rest,
for our own families (each registers itself with `register_family`) and, by reference, for families that timm
already has. It imports nothing of vitzoo.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import create_model, get_arch_pretrained_cfgs, get_pretrained_cfg, is_model
from timm.models import list_models as timm_list_models

CATEGORIES = ("hierarchical", "token-pruning", "hilo", "scan", "convolutional", "equivariant")


class UnknownModelError(ValueError, RuntimeError):
    """No model of that name; the message lists close matches.

    It is a RuntimeError too because that is what `timm.create_model` raises.
    """


@dataclass(frozen=True)
class Published:
    """Figures printed by the authors for one model.

    Attributes:
        params: number of trainable parameters, counted from the authors' code.
        gmacs: multiply-accumulates of one image in units of 1e9, as printed (papers call them FLOPs).
        top1: ImageNet-1k top-1 accuracy in per cent.
        source: where the figures stand.
    """

    params: int | None = None
    gmacs: float | None = None
    top1: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Tag:
    """One published checkpoint: `model.tag` in timm's naming.

    Attributes:
        args: constructor arguments that the checkpoint was trained with; create_model applies them.
        gmacs, top1: as in `Published`, where they differ from the model's.
        get: where a person gets the file when code cannot fetch it (Google Drive, OneDrive); None if it can.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    gmacs: float | None = None
    top1: float | None = None
    get: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models and what was published about it.

    Attributes:
        name: family name, the file's name under vitzoo/models.
        categories: members of `CATEGORIES`.
        paper: title, venue and arXiv number.
        code: authors' repository, at the commit that was followed.
        code_license, weights_license: SPDX names, or a sentence where the authors state none.
        models: model name -> its published figures.
        tags: "model.tag" -> what that checkpoint sets.
        origin: "vitzoo", or "timm" for families listed by reference.
    """

    name: str
    categories: tuple[str, ...]
    paper: str
    code: str
    code_license: str
    weights_license: str
    models: Mapping[str, Published]
    tags: Mapping[str, Tag] = field(default_factory=dict)
    origin: str = "vitzoo"


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a model, as `model_info` reports it.

    Attributes:
        name: "model.tag".
        url: address that code can fetch, or None.
        get: where a person gets the file otherwise, or None.
    """

    name: str
    url: str | None
    get: str | None
    license: str | None
    input_size: tuple[int, int, int]
    args: Mapping[str, Any]
    gmacs: float | None
    top1: float | None


@dataclass(frozen=True)
class ModelInfo:
    """Everything the registry knows of one model; see `Family` and `Published` for the fields."""

    name: str
    family: str
    categories: tuple[str, ...]
    paper: str
    code: str
    code_license: str
    weights_license: str
    params: int | None
    gmacs: float | None
    top1: float | None
    source: str
    input_size: tuple[int, int, int]
    origin: str
    checkpoints: tuple[CheckpointInfo, ...]


_families: dict[str, Family] = {}
_model_to_family: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family to the registry.

    Args:
        family: its description; its models' constructors are registered with timm by the family's file.

    Returns:
        The same object, so that a module can keep it.

    Raises:
        ValueError: an unknown category, or a model name that another family or timm itself already has.
    """
    unknown = set(family.categories) - set(CATEGORIES)
    if unknown:
        raise ValueError(f"family {family.name!r}: unknown categories {sorted(unknown)}; known: {CATEGORIES}")
    for name in family.models:
        owner = _model_to_family.get(name)
        if owner is not None:
            raise ValueError(f"model {name!r} of family {family.name!r} is already in family {owner.name!r}")
        if family.origin == "vitzoo" and is_model(name):
            raise ValueError(
                f"model {name!r} is already registered with timm; vitzoo never overwrites a model"
            )
    _families[family.name] = family
    _model_to_family.update(dict.fromkeys(family.models, family))
    return family


def families() -> tuple[Family, ...]:
    """Return all registered families, in order of registration."""
    return tuple(_families.values())


def _split(name: str) -> tuple[str, str]:
    model, _, tag = name.partition(".")
    return model, tag


def family_of(name: str) -> Family | None:
    """Return the family of a model name (with or without tag), None if vitzoo does not list it."""
    return _model_to_family.get(_split(name)[0])


def tag_info(name: str) -> Tag:
    """Return what the checkpoint "model.tag" sets; an empty `Tag` if nothing is recorded."""
    family = family_of(name)
    return family.tags.get(name, Tag()) if family else Tag()


def check_name(name: str) -> str:
    """Return `name` if vitzoo or timm has a model of that name.

    Args:
        name: model name, with or without a tag.

    Raises:
        UnknownModelError: no such model or tag; the message lists close matches.
    """
    model, tag = _split(name)
    if not is_model(model):
        known = list(dict.fromkeys([*_model_to_family, *timm_list_models()]))
        holding = [m for m in known if model and model in m][:4]
        similar = difflib.get_close_matches(model, known, n=5, cutoff=0.5)
        starting = [m for m in known if model and m.startswith(model[:3])]
        close = list(dict.fromkeys([*holding, *similar, *starting]))[:6]
        hint = f"did you mean {', '.join(close)}?" if close else "vitzoo.list_models() lists what there is"
        raise UnknownModelError(f"unknown model {name!r}: {hint}")
    if tag and name not in (tagged := get_arch_pretrained_cfgs(model)):
        raise UnknownModelError(
            f"unknown pretrained tag {tag!r} of model {model!r}; known: {', '.join(tagged)}"
        )
    return name


def list_models(
    filter: str | Iterable[str] = "*", category: str | None = None, family: str | None = None
) -> list[str]:
    """List the models of the zoo: ours, and timm's that belong to its categories.

    Args:
        filter: wildcard pattern, or several.
        category: one of `CATEGORIES`.
        family: a family's name.

    Returns:
        Model names without tags, sorted.

    Raises:
        ValueError: an unknown category or family, with the known ones.
    """
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
    if family is not None and family not in _families:
        close = difflib.get_close_matches(family, _families, n=3)
        raise ValueError(
            f"unknown family {family!r}; {'close' if close else 'known'}: {', '.join(close or _families)}"
        )
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return sorted(
        name
        for name, owner in _model_to_family.items()
        if (category is None or category in owner.categories)
        and (family is None or family == owner.name)
        and any(fnmatch.fnmatchcase(name, pattern or "*") for pattern in patterns)
    )


def _checkpoints(model: str, family: Family) -> tuple[CheckpointInfo, ...]:
    found = []
    for name, cfg in get_arch_pretrained_cfgs(model).items():
        tag = family.tags.get(name, Tag())
        url = cfg.url if isinstance(cfg.url, str) else None
        if url is None and cfg.hf_hub_id:
            url = f"https://huggingface.co/{cfg.hf_hub_id.rstrip('/')}"
            url += f"/resolve/main/{cfg.hf_hub_filename}" if cfg.hf_hub_filename else ""
        if url is None and tag.get is None:
            continue
        found.append(
            CheckpointInfo(
                name, url, tag.get, cfg.license, cfg.input_size, dict(tag.args), tag.gmacs, tag.top1
            )
        )
    return tuple(found)


@functools.cache
def _count_params(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(model).parameters() if p.requires_grad)


def model_info(name: str) -> ModelInfo:
    """Return what is known of a model.

    Args:
        name: model name; a tag is ignored.

    Raises:
        UnknownModelError: no such model (with close matches), or a timm model outside the zoo's categories.
    """
    model = _split(check_name(name))[0]
    family = family_of(model)
    if family is None:
        raise UnknownModelError(
            f"{model!r} is a timm model outside vitzoo's categories: create_model builds it, no more is known"
        )
    figures = family.models[model]
    cfg = get_pretrained_cfg(model)
    return ModelInfo(
        name=model,
        family=family.name,
        categories=family.categories,
        paper=family.paper,
        code=family.code,
        code_license=family.code_license,
        weights_license=family.weights_license,
        params=_count_params(model) if figures.params is None else figures.params,
        gmacs=figures.gmacs,
        top1=figures.top1,
        source=figures.source,
        input_size=cfg.input_size if cfg else (3, 224, 224),
        origin=family.origin,
        checkpoints=_checkpoints(model, family),
    )
