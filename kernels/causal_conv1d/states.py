"""The states before and after the tokens, which every backend treats alike."""

from __future__ import annotations

from torch import Tensor


def final_states_of(x: Tensor, initial_states: Tensor | None, count: int, reverse: bool) -> Tensor:
    """Return the last `count` samples of [initial_states, x] in the order of the walk, (B, D, count).

    Args:
        x: (B, D, L).
        initial_states: (B, D, count), zeros if None.
        count: W - 1.
        reverse: whether the walk goes from the last token to the first.
    """
    last = x[..., :count].flip(-1) if reverse else x[..., max(0, x.shape[-1] - count) :]
    if last.shape[-1] == count:
        return last.contiguous()
    states = x.new_zeros((*x.shape[:2], count))
    states[..., count - last.shape[-1] :] = last
    if initial_states is not None:
        states[..., : count - last.shape[-1]] = initial_states[..., last.shape[-1] :]
    return states


def add_final_gradient(dfinal: Tensor, dx: Tensor, dinitial: Tensor | None, reverse: bool) -> None:
    """Add the gradient that comes through the final states to those of x and of the initial states, in place.

    Args:
        dfinal: (B, D, W - 1).
        dx: (B, D, L).
        dinitial: (B, D, W - 1), if there are initial states.
        reverse: whether the walk goes from the last token to the first.
    """
    seqlen, count = dx.shape[-1], dfinal.shape[-1]
    shared = min(seqlen, count)
    through_x = dfinal[..., count - shared :]
    if reverse:
        dx[..., :shared] += through_x.flip(-1).to(dx.dtype)
    else:
        dx[..., seqlen - shared :] += through_x.to(dx.dtype)
    if dinitial is not None and shared < count:
        dinitial[..., shared:] += dfinal[..., : count - shared].to(dinitial.dtype)
