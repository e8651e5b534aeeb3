"""Small connected components of a binary mask, by runs and without an image library.

A row's pixels are grouped into runs first, and runs of neighbouring rows that touch are then
joined. A mask of a few hundred pixels a side has at most a few thousand runs, so this costs a
fraction of a millisecond, and needs nothing but NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def small_components(wanted: NDArray[np.bool_], max_area: float) -> NDArray[np.bool_] | None:
    """Pixels of the 8-connected components of ``wanted`` that have at most ``max_area`` pixels.

    Args:
        wanted: bool [h, w].
        max_area: in pixels.

    Returns:
        bool [h, w], or ``None`` where there are none.
    """
    height, width = wanted.shape
    # A blank column on either side ends every run within its row, and keeps the last run of a
    # row from touching the first of the next but one.
    stride = width + 2
    padded = np.zeros((height, stride), np.int8)
    padded[:, 1:-1] = wanted
    steps = np.diff(padded.ravel())
    starts = np.flatnonzero(steps == 1)
    ends = np.flatnonzero(steps == -1)
    if not len(starts):
        return None
    labels = _join(len(starts), *_touching(starts, ends, stride))
    areas = np.bincount(labels, weights=ends - starts)
    small = areas[labels] <= max_area
    if not small.any():
        return None
    # Painting runs: +1 where one starts, -1 after it ends, then a running sum.
    edges = np.zeros(height * stride, np.int8)
    edges[starts[small] + 1] = 1
    edges[ends[small] + 1] = -1
    painted = np.cumsum(edges, dtype=np.int8).reshape(height, stride)
    return np.ascontiguousarray(painted[:, 1:-1]).view(np.bool_)


def _touching(
    starts: NDArray[np.intp], ends: NDArray[np.intp], stride: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs of runs in neighbouring rows that touch, corners included.

    Runs are in reading order, so those below run i that touch it are consecutive: from the first
    that ends at or after its left neighbour column to the last that starts at or before its right
    one.
    """
    first = np.searchsorted(ends, starts + stride, side="left")
    last = np.searchsorted(starts, ends + stride, side="right")
    counts = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), counts)
    position = np.arange(len(upper)) - np.repeat(np.cumsum(counts) - counts, counts)
    return upper, np.repeat(first, counts) + position


def _join(count: int, upper: NDArray[np.intp], lower: NDArray[np.intp]) -> NDArray[np.intp]:
    """Label runs so that joined runs share the label, which is their lowest number."""
    labels = np.arange(count)
    while len(upper):
        a, b = labels[upper], labels[lower]
        apart = a != b
        upper, lower, a, b = upper[apart], lower[apart], a[apart], b[apart]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while True:  # follow labels to their roots
            roots = labels[labels]
            if np.array_equal(roots, labels):
                break
            labels = roots
    return labels
