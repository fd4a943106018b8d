"""Fewer points of a curve, with the same extremes."""

from __future__ import annotations

import math
from collections.abc import Iterable

Point = tuple[float, float]


def thinned(points: Iterable[Point], limit: int = 2000) -> list[Point]:
    """Return about ``limit`` of a curve's points: of each stretch the first, the lowest, the highest and the last.

    Args:
        points: x and y, ordered by x; y may be NaN, of which one in each stretch is kept, so that a gap stays a gap.
        limit: points up to which all are kept.

    >>> curve = [(float(x), 0.0) for x in range(10_000)]
    >>> curve[5432] = (5432.0, 7.0)
    >>> few = thinned(curve)
    >>> len(few) <= 2000, (5432.0, 7.0) in few
    (True, True)
    """
    points = list(points)
    if len(points) <= limit:
        return points
    stretch = math.ceil(len(points) * 5 / limit)
    kept: list[Point] = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        finite = [one for one in part if not math.isnan(one[1])]
        gaps = [one for one in part if math.isnan(one[1])][:1]
        chosen = {part[0], part[-1], *gaps}
        if finite:
            chosen |= {min(finite, key=_height), max(finite, key=_height)}
        kept += sorted(chosen, key=lambda one: one[0])
    return kept


def _height(point: Point) -> float:
    return point[1]
