"""Outlines of masks as polygons along the edges of pixels.

Corners are found first: the points where an outline turns. Along a row of corners, the first and
the second are the ends of one horizontal edge, the third and the fourth of the next, and so on;
columns likewise give the vertical edges. An outline is then a walk along horizontal and vertical
edges in turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]


def outlines(mask: NDArray[np.bool_], tolerance: float = 0.0) -> list[Ring]:
    """The outlines of a mask, largest first.

    Pixels that touch at a corner belong together, as in :func:`sam3rt.masks.clean`. The pixel in
    row 0 and column 0 has the corners (0, 0) and (1, 1). Without a tolerance the outlines enclose
    the mask's pixels and nothing else.

    Args:
        mask: bool [H, W].
        tolerance: how far an outline may leave the pixels' edges to have fewer points, pixels.
            Outlines that shrink to a line are left out.

    Returns:
        float64 [M, 2] each, (x, y), without the first point again at the end. Outer outlines run
        clockwise as seen, and have a positive :func:`signed_area`; those of holes run the other
        way.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    rings = [ring + np.array([left, top], np.float64) for ring in _trace(inside)]
    if tolerance > 0:
        rings = [ring for ring in (_simplify(r, tolerance) for r in rings) if len(ring) > 2]
    return sorted(rings, key=lambda ring: -abs(signed_area(ring)))


def signed_area(ring: Ring) -> float:
    """The area within an outline, pixels; negative for the outline of a hole."""
    x, y = ring.T
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def joined(rings: list[Ring]) -> Ring:
    """One outline through several, holes included, for formats that allow one an object.

    It goes from one to the next and back along the same line, which encloses nothing.
    """
    path = rings[0]
    for ring in rings[1:]:
        squares = ((path[:, None] - ring[None]) ** 2).sum(axis=2)
        here, there = np.unravel_index(squares.argmin(), squares.shape)
        turned = np.roll(ring, -there, axis=0)
        path = np.concatenate([path[: here + 1], turned, turned[:1], path[here:]])
    return path


def _trace(inside: NDArray[np.bool_]) -> list[Ring]:
    """Outlines within a mask that has an empty pixel all around, in pixels of what it surrounds."""
    upper_left, upper_right = inside[:-1, :-1], inside[:-1, 1:]
    lower_left, lower_right = inside[1:, :-1], inside[1:, 1:]
    turns = upper_left ^ upper_right ^ lower_left ^ lower_right
    # Two pixels that touch at a corner: two outlines pass, or one passes twice.
    saddles = (upper_left == lower_right) & (upper_right == lower_left)
    saddles &= upper_left != upper_right
    y, x = np.nonzero(turns | saddles)
    number = np.repeat(np.arange(len(y)), 1 + saddles[y, x])
    y, x = y[number], x[number]
    twice = saddles[y, x]
    falling = upper_left[y, x]  # at a saddle: from the upper left to the lower right
    outer = lower_right[y, x]
    second = np.zeros(len(y), np.bool_)
    second[1:] = number[1:] == number[:-1]
    # Of a saddle's two, the first ends the edge on its left. Which of them ends the edge above
    # decides what belongs together: here, the two pixels.
    is_lower = np.where(falling, ~second, second) & twice
    by_column = np.lexsort((is_lower, y, x))
    across = np.empty(len(y), np.int64)
    across[by_column[0::2]], across[by_column[1::2]] = by_column[1::2], by_column[0::2]

    points = np.stack([x, y], axis=1).astype(np.float64)
    partner: list[int] = across.tolist()
    seen = bytearray(len(y))
    rings = []
    for start in range(0, len(y), 2):
        if seen[start]:
            continue
        # The highest edge of a ring that is new, from its left end.
        walk, at = [], start
        while not seen[at]:
            end = at ^ 1
            seen[at] = seen[end] = 1
            walk += [at, end]
            at = partner[end]
        rings.append(points[walk] if outer[start] else points[walk[::-1]])
    return rings


def _simplify(ring: Ring, tolerance: float) -> Ring:
    """Douglas and Peucker's choice of points, from the first and the one farthest from it."""
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    kept = {0, far}
    pending = [(0, far), (far, len(ring))]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        line = closed[last] - closed[first]
        offset = closed[first + 1 : last] - closed[first]
        length = float(np.hypot(*line))
        if length:
            distance = np.abs(line[0] * offset[:, 1] - line[1] * offset[:, 0]) / length
        else:
            distance = np.hypot(*offset.T)
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            kept.add(middle)
            pending += [(first, middle), (middle, last)]
    return ring[sorted(kept)]
