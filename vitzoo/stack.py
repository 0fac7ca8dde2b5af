"""Room on CPython's stack of frames, for functions that call much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])
# words of 8 bytes: eight blocks of the usual 16 KB, and what is left of the block is as much again
ROOM = 1 << 14


def with_room(function: _F) -> _F:
    """Give a Python function's frame a block of CPython's stack to itself, large enough for the calls within it.

    CPython 3.11 and later keep frames in blocks of 16 KB. A call that the present block has no room for maps a new
    one and unmaps it on return, which stops every core that runs a thread of the process. If the calls of a loop, or
    those of a model's forward pass, lie across the end of a block, each of them pays that price: the integer form of
    Vim-Ti was slower below one depth of the caller's stack than below another. A frame that asks for a large evaluation
    stack takes a large block, once a call.

    Args:
        function: written in Python; it is changed in place and returned, so that this is a decorator too.

    Source: `push_chunk` and `_PyThreadState_PopFrame` of CPython's Python/pystate.c.
    """
    python: Any = function
    python.__code__ = python.__code__.replace(co_stacksize=max(python.__code__.co_stacksize, ROOM))
    return function
