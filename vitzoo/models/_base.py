"""The contract every backbone of ours keeps with timm, written once.

Legend: B batch, C channels, H W height and width.

A family subclasses `Backbone`, fills the attributes below in its constructor and supplies six hooks: `_stem`,
`_step`, `_tap`, `_final`, `_pool`, `_truncate`. A *tap* is a place whose output can be handed out as a
feature map: a stage of a hierarchical network, a block of a plain one. Families that are variations of a timm
class subclass that class instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import get_device_dtype, to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn


class Backbone(nn.Module):
    """A timm citizen over six hooks.

    Attributes set by the family's constructor:
        num_classes, in_chans: as passed.
        num_features, head_hidden_size: channels that enter the classifier.
        global_pool: name of the pooling, "" for none.
        feature_info: one dict(num_chs, reduction, module) a tap.
        head_drop, head: dropout and classifier.
        pools: names that `global_pool` accepts, "" among them.
    """

    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    global_pool: str
    feature_info: list[dict[str, Any]]
    head_drop: nn.Module
    head: nn.Module
    pools: tuple[str, ...] = ("", "avg")
    output_fmt = "NCHW"

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def _stem(self, x: Tensor) -> Any:
        """Return the state before the first tap, from an image (B, in_chans, H, W)."""
        raise NotImplementedError

    def _step(self, index: int, state: Any) -> Any:
        """Advance the state through tap `index`."""
        raise NotImplementedError

    def _tap(self, index: int, state: Any, norm: bool) -> Tensor:
        """Return the map (B, C, H, W) of tap `index`, normalised as for the classifier if `norm`."""
        raise NotImplementedError

    def _final(self, state: Any) -> Tensor:
        """Return what `forward_features` returns, from the state after the last tap."""
        raise NotImplementedError

    def _pool(self, x: Tensor) -> Tensor:
        """Return (B, num_features) from what `_final` gave; called when `global_pool` is not empty."""
        raise NotImplementedError

    def _truncate(self, count: int) -> None:
        """Drop every module that taps 0 .. count - 1 do not need, the final norm excepted."""
        raise NotImplementedError

    def _drop_final_norm(self) -> None:
        """Replace the final norm by the identity."""
        self.norm: nn.Module = nn.Identity()

    def _checkpointed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function, recomputing it in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and self.training:
            return checkpoint(function, *args)
        return function(*args)

    @property
    def num_taps(self) -> int:
        """Number of taps."""
        return len(self.feature_info)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling, from an image (B, in_chans, H, W)."""
        state = self._stem(x)
        for index in range(self.num_taps):
            state = self._step(index, state)
        return self._final(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of `forward_features`' result; pooled (B, C) if `pre_logits`."""
        if self.global_pool:
            x = self._pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of an image (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final features and the feature maps of some taps.

        Args:
            x: image, (B, in_chans, H, W).
            indices: last n taps if an integer, all if None, else the taps' numbers.
            norm: normalise the maps as the classifier would.
            stop_early: stop at the last tap that is asked for.
            output_fmt: "NCHW" only.
            intermediates_only: leave out the final features.

        Returns:
            (features, [map, ...]) or [map, ...]; a map is (B, C, H, W).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not available, only 'NCHW'")
        take, last = feature_take_indices(self.num_taps, indices)
        state = self._stem(x)
        maps = []
        for index in range(last + 1 if stop_early else self.num_taps):
            state = self._step(index, state)
            if index in take:
                maps.append(self._tap(index, state, norm))
        if intermediates_only:
            return maps
        return self._final(state), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the modules that the taps asked for do not need.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: drop the final norm too.
            prune_head: drop the classifier too.

        Returns:
            The numbers of the taps kept.
        """
        take, last = feature_take_indices(self.num_taps, indices)
        shortened = last < self.num_taps - 1
        if shortened:
            self._truncate(last + 1)
            self.feature_info = self.feature_info[: last + 1]
            if self.feature_info[last]["num_chs"] != self.num_features:
                self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
                prune_norm = prune_head = True
        if prune_norm:
            self._drop_final_norm()
        if prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: classes of the new one, 0 for none.
            global_pool: new pooling, None to keep the present one.

        Raises:
            ValueError: a pooling that the family does not have.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._make_head(**get_device_dtype(self))
        self.head.train(self.training)

    def _make_head(self, device: Any = None, dtype: Any = None) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, device=device, dtype=dtype)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in self.pools:
            raise ValueError(
                f"global_pool {global_pool!r} is not one of {self.pools} that {type(self).__name__} has"
            )
        return global_pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> None:
        """Adapt the model to another input size.

        Args:
            img_size: height and width in pixels.
            kwargs: none is known here; a family whose patch size can change overrides this method.

        Raises:
            TypeError: an unknown argument.
            ValueError: a size the design does not allow.
        """
        if kwargs:
            raise TypeError(
                f"{type(self).__name__}.set_input_size has no argument {', '.join(map(repr, kwargs))}"
            )
        if img_size is None:
            return
        size = to_2tuple(img_size)
        self._resize(size)
        update_model_input_size(self, size)

    def _resize(self, img_size: tuple[int, int]) -> None:
        """Adapt what depends on the input size; nothing by default."""

    def _check_channels(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"input has shape {tuple(x.shape)}, expected (B, {self.in_chans}, H, W)")
