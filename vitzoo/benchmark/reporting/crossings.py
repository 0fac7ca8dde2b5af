"""Where two lines of a chart cross."""

from __future__ import annotations

from collections.abc import Sequence

Line = Sequence[tuple[float, float]]


def crossings(a: Line, b: Line) -> list[tuple[float, float, bool]]:
    """Return where two lines change places.

    Args:
        a: points (x, y); of several at one x the last counts.
        b: the same; places at which only one of the two has a point do not count.

    Returns:
        (low, high, first) for each change: the measured places between which it lies, and whether it is `a` that is
        below from there on.
    """
    at_a, at_b = dict(a), dict(b)
    found = []
    before: tuple[float, bool] | None = None
    for x in sorted(at_a.keys() & at_b.keys()):
        if at_a[x] == at_b[x]:
            continue
        below = at_a[x] < at_b[x]
        if before is not None and before[1] != below:
            found.append((before[0], x, below))
        before = (x, below)
    return found
