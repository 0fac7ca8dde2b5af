"""Frames: a function with room pays nothing for its calls, however deep it is called."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import pytest

from vitzoo.stack import with_room

resource = pytest.importorskip("resource")  # where there is no getrusage, faults cannot be counted
CALLS = 300


def leaf() -> None:
    pass


def loop() -> None:
    for _ in range(CALLS):
        leaf()


@with_room
def roomy_loop() -> None:
    for _ in range(CALLS):
        leaf()


def faults_at(depth: int, function: Callable[[], None]) -> int:
    """Return the pages that a call touched first, below so many frames."""
    if depth:
        return faults_at(depth - 1, function)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def most_faults(function: Callable[[], None]) -> int:
    for depth in range(400):  # touches what the recursion itself needs
        faults_at(depth, leaf)
    return max(faults_at(depth, function) for depth in range(400))


def test_calls_of_a_function_with_room_never_map_memory() -> None:
    assert most_faults(roomy_loop) < CALLS / 4


@pytest.mark.skipif(
    platform.python_implementation() != "CPython" or sys.version_info[:2] != (3, 11),
    reason="how blocks are given back is an affair of each version of CPython",
)
def test_calls_of_one_without_do_at_some_depth() -> None:
    assert most_faults(loop) >= CALLS


def test_the_function_is_the_same_otherwise() -> None:
    class Base:
        def f(self, a: int, *, b: int = 2) -> int:
            return a + b

    class Derived(Base):
        @with_room
        def f(self, a: int, *, b: int = 3) -> int:
            """Add."""
            return super().f(a, b=b) * 10

    assert Derived().f(1) == 40
    assert Derived().f(1, b=1) == 20
    assert (Derived.f.__name__, Derived.f.__doc__) == ("f", "Add.")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Derived().f()  # type: ignore[call-arg]
