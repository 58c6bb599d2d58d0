"""Where the labels of points go so that they hide neither each other nor what is drawn: plain geometry, no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_DISTANCES = (9, 16, 26, 38, 52)
_SIDES = ((1, 1), (1, 0), (1, -1), (-1, 1), (-1, 0), (-1, -1), (0, 1), (0, -1))
"""Where a label may stand, seen from its point, best first."""
_OUTSIDE = 10.0
"""How much worse it is to leave the frame than to cover something."""


class Box(NamedTuple):
    """A rectangle, in any unit of length."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def area(self) -> float:
        """0 for a box that is turned inside out."""
        return max(self.right - self.left, 0) * max(self.top - self.bottom, 0)


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[Box]:
    """A box of its size, (width, height), for the label of each point (x, y), in units of about a pixel.

    Labels are placed one after the other, each at the nearest place that covers nothing, or else at the one that
    covers least. The same points give the same places.
    """
    taken = list(obstacles)
    placed = []
    for (x, y), size in zip(points, sizes, strict=True):
        places = [_beside(x, y, size, side, distance) for distance in _DISTANCES for side in _SIDES]
        best = min(places, key=lambda box: _cost(box, taken, frame))  # of equal ones the first
        taken.append(best)
        placed.append(best)
    return placed


def _beside(x: float, y: float, size: tuple[float, float], side: tuple[int, int], distance: float) -> Box:
    """The box `distance` away from a point; it is centred where it lies neither left nor right, or neither above
    nor below."""
    left, bottom = (
        at + towards * distance + length * (towards - 1) / 2
        for at, towards, length in zip((x, y), side, size, strict=True)
    )
    return Box(left, bottom, left + size[0], bottom + size[1])


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    return sum(_shared(box, other) for other in taken) + _OUTSIDE * (box.area - _shared(box, frame))


def _shared(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    return Box(max(a.left, b.left), max(a.bottom, b.bottom), min(a.right, b.right), min(a.top, b.top)).area
