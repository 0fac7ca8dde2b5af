"""create_model: timm's, with an unknown name answered by close matches."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from vitzoo import models as _models  # noqa: F401  (registers them)
from vitzoo import registry


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a backbone of ours or of timm's; the same as `timm.create_model` once vitzoo is imported.

    Args:
        name: model name, or "model.tag" for one published checkpoint and the arguments it was trained with.
        pretrained: load its weights.
        kwargs: as for timm: `num_classes`, `in_chans`, `img_size`, `global_pool`, `features_only`,
            `out_indices`, `pretrained_cfg_overlay={"file": path}`, `drop_path_rate`, ... and the family's
            own. `use_ema=True` takes the moving average of a file that has one.

    Returns:
        The model, in training mode.

    Raises:
        UnknownModelError: no such model or tag, with close matches.
        CheckpointError: weights that cannot be read, do not fit, or must be fetched by hand.
        TypeError: an argument the model does not have.
    """
    if ":" not in name:
        registry.check_name(name)
    return timm.create_model(name, pretrained=pretrained, **kwargs)
