"""Build a model of ours: a checkpoint's own arguments, a safe read of its file, timm's builder, an exact fit.

timm's builder does everything but two things: it reads files with its own loader, which refuses the training
state that authors publish beside their weights, and it does not know arguments that belong to a checkpoint (a
keep rate, an alpha). Both happen here, before timm sees the state dict, so `timm.create_model` and
`vitzoo.create_model` behave alike.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, model_entrypoint
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._hub import download_cached_file
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from vitzoo import registry
from vitzoo.checkpoint import CheckpointError, misfit, read_checkpoint

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
Filter = Callable[[StateDict, nn.Module], StateDict]


def build(
    cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    filter_fn: Filter,
    defaults: Mapping[str, Any],
    feature_taps: tuple[int, ...] = (0, 1, 2, 3),
    **kwargs: Any,
) -> nn.Module:
    """Build one variant of a family; what every entry point returns.

    Args:
        cls: the family's class.
        variant: registry name.
        pretrained: load weights: the tag's, or those of `pretrained_cfg_overlay={"file": path}`.
        filter_fn: the family's `checkpoint_filter_fn(state_dict, model)`.
        defaults: the variant's constructor arguments; the checkpoint's own arguments go over them, the
            caller's over both.
        feature_taps: taps that `features_only=True` gives unless `out_indices` asks otherwise.
        kwargs: the caller's arguments, timm's `pretrained_cfg`, `pretrained_cfg_overlay`, `features_only`,
            ... included. `use_ema=True` takes the moving average where a file has one.

    Raises:
        CheckpointError: a file that is damaged, refused, of another variant (the message names the variant it
            fits), or that only a person can fetch (the message says from where).
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(variant, kwargs.pop("pretrained_cfg", None), overlay)
    tag_args = dict(registry.tag_info(f"{variant}.{cfg.tag}").args)
    args = {**defaults, **tag_args, **kwargs}
    use_ema = bool(args.pop("use_ema", False))
    sources = dataclasses.replace(cfg)
    if pretrained and not (cfg.source or cfg.state_dict):
        cfg = _with_weights(cfg, variant, use_ema, args.get("cache_dir"))
    model = build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=_exact(filter_fn, variant, cfg),
        feature_cfg=dict(out_indices=feature_taps, feature_cls="getter"),
        **args,
    )
    # the weights themselves stay out of the model's description
    model.pretrained_cfg.pop("state_dict", None)
    for name in ("url", "file", "hf_hub_id", "hf_hub_filename"):
        if (value := getattr(sources, name)) is not None:
            model.pretrained_cfg[name] = value
    # timm adds the caller's own: a saved folder then rebuilds the same model
    model._model_args = tag_args
    return cast(nn.Module, model)


def _with_weights(cfg: PretrainedCfg, variant: str, use_ema: bool, cache_dir: Any) -> PretrainedCfg:
    """Return the configuration with the weights in it instead of their address."""
    found = read_checkpoint(_weights_path(cfg, variant, cache_dir), use_ema)
    if found.key:
        _logger.info("weights of %s taken from key %r of %s", variant, found.key, found.path)
    changes: dict[str, Any] = {"state_dict": found.state_dict, "url": None, "file": None, "hf_hub_id": None}
    head = found.state_dict.get(f"{cfg.classifier}.weight")
    if head is not None:
        # a fine-tuned file has its own number of classes: timm drops the head only where the model's differs
        # from it
        changes["num_classes"] = head.shape[0]
    return dataclasses.replace(cfg, **changes)


def _weights_path(cfg: PretrainedCfg, variant: str, cache_dir: Any) -> Path:
    if cfg.file:
        return Path(cfg.file)
    try:
        if cfg.hf_hub_id:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir=cache_dir))
        if cfg.url:
            return Path(download_cached_file(cfg.url, progress=True, cache_dir=cache_dir))
    except Exception as error:
        raise CheckpointError(
            f"the weights of {variant}.{cfg.tag} could not be fetched from {cfg.url or cfg.hf_hub_id}: "
            f"{error}. "
            f"{_pass_file('Fetch the file otherwise')}"
        ) from error
    name = f"{variant}.{cfg.tag}" if cfg.tag else variant
    get = registry.tag_info(name).get
    if get:
        raise CheckpointError(
            f"the weights of {name} cannot be fetched by code. {_pass_file(f'Get the file from {get}')}"
        )
    raise CheckpointError(
        f"no weights are published for {name}; use pretrained=False, or {_pass_file('with your own')}"
    )


def _pass_file(start: str) -> str:
    return f"{start} and pass pretrained=True, pretrained_cfg_overlay={{'file': 'path/of/the/file.pth'}}."


def _exact(filter_fn: Filter, variant: str, cfg: PretrainedCfg) -> Filter:
    """Wrap a family's filter: weights of another variant are refused with the name of the one they fit."""

    def filter_and_check(state_dict: StateDict, model: nn.Module) -> StateDict:
        source = dict(state_dict)
        try:
            weights = filter_fn(dict(source), model)
            lines = _lines(weights, model, cfg)
        except (KeyError, ValueError) as error:
            lines = [str(error)]
        if not lines:
            return weights
        fits = _variants_that_fit(source, variant)
        hint = (
            f"It fits {', '.join(fits)}: create that model instead."
            if fits
            else "It fits no model of this zoo."
        )
        raise CheckpointError(f"the checkpoint does not fit {variant} ({'; '.join(lines)}). {hint}")

    return filter_and_check


def _lines(weights: StateDict, model: nn.Module, cfg: PretrainedCfg) -> list[str]:
    """Return what does not fit, the classifier and the first convolution excepted: timm adapts those."""
    adapted = tuple(
        f"{name}."
        for names in (cfg.classifier, cfg.first_conv)
        if names
        for name in ([names] if isinstance(names, str) else names)
    )

    def rest(table: Mapping[str, Tensor]) -> StateDict:
        return {k: v for k, v in table.items() if not k.startswith(adapted)} if adapted else dict(table)

    return misfit(rest(weights), rest(model.state_dict()))


def _variants_that_fit(state_dict: StateDict, tried: str) -> list[str]:
    """Return the models of ours, same family first, that the weights fit; they are built without memory."""
    family = registry.family_of(tried)
    ours = [f for f in registry.families() if f.origin == "vitzoo"]
    ours.sort(key=lambda f: f is not family)
    for candidate in ours:
        names = [n for n in candidate.models if n != tried and _fits(n, state_dict)]
        if not names and candidate is family:
            names = _tags_that_fit(candidate, state_dict)
        if names:
            return names
    return []


def _tags_that_fit(family: registry.Family, state_dict: StateDict) -> list[str]:
    """Return the checkpoints of a family that the weights fit: their arguments can change shapes too."""
    found: dict[str, bool] = {}
    for name, tag in family.tags.items():
        same = f"{name.split('.')[0]} {sorted(tag.args.items())}"
        if tag.args and same not in found:
            found[same] = _fits(name, state_dict) or _fits(name, state_dict, features_only=True)
            if found[same]:
                return [name]
    return []


def _plausible(name: str, state_dict: StateDict) -> bool:
    """Return whether the sizes are near enough, other classes and resolutions allowed, to be worth a build."""
    name = name.split(".")[0]
    family = registry.family_of(name)
    params = family.models[name].params if family else None
    ratio = sum(v.numel() for v in state_dict.values()) / params if params else 1
    return 0.5 < ratio < 2


def _fits(name: str, state_dict: StateDict, **kwargs: Any) -> bool:
    if not _plausible(name, state_dict):
        return False
    entry = model_entrypoint(name)
    filter_fn = sys.modules[entry.__module__].checkpoint_filter_fn
    cfg = next(iter(get_arch_pretrained_cfgs(name.split(".")[0]).values()))
    with torch.device("meta"):
        model = entry(pretrained=False, **registry.tag_info(name).args, **kwargs)
    if isinstance(model, FeatureGetterNet):
        model = model.model
    try:
        weights = filter_fn({k: v.to("meta") for k, v in state_dict.items()}, model)
    except (KeyError, ValueError, RuntimeError):
        return False
    return not _lines(weights, model, cfg)
