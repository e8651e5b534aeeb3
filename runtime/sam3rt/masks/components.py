"""Small connected components of a binary mask, by runs and without an image library.

A row's pixels are grouped into runs first, and runs of neighbouring rows that touch are then
joined. A mask of a few hundred pixels a side has at most a few thousand runs, so this costs a
fraction of a millisecond, and needs nothing but NumPy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    runs = _Runs.of(wanted)
    if not len(runs.starts):
        return None
    small = runs.areas[runs.labels] <= max_area
    return runs.paint(small) if small.any() else None


def remove_small_regions(mask: NDArray[np.bool_], min_area: float) -> NDArray[np.bool_]:
    """Fill holes, then remove islands, that are smaller than an area.

    Components are 8-connected. Where all islands are smaller, the first of the largest is kept.

    Args:
        mask: bool [h, w].
        min_area: in pixels.

    Returns:
        bool [h, w]: the mask itself where nothing changed.
    """
    most = math.ceil(min_area) - 1
    holes = small_components(~mask, most)
    if holes is not None:
        mask = mask | holes
    runs = _Runs.of(mask)
    if not len(runs.starts):
        return mask
    large = runs.areas[runs.labels] > most
    if large.all():
        return mask
    if not large.any():
        large = runs.labels == runs.areas.argmax()
    return runs.paint(large)


class _Runs(NamedTuple):
    """The runs of a mask, row by row, and which component each belongs to.

    Attributes:
        shape: of the mask.
        starts: where each run starts, in the mask with a blank column on either side.
        ends: where it has ended.
        labels: of its component: the number of the component's first run.
        areas: by label, pixels.
    """

    shape: tuple[int, int]
    starts: NDArray[np.intp]
    ends: NDArray[np.intp]
    labels: NDArray[np.intp]
    areas: NDArray[Any]

    @classmethod
    def of(cls, wanted: NDArray[np.bool_]) -> _Runs:
        """The runs of a mask, bool [h, w]."""
        height, width = wanted.shape
        # A blank column on either side ends every run within its row, and keeps the last run of a
        # row from touching the first of the next but one.
        stride = width + 2
        padded = np.zeros((height, stride), np.int8)
        padded[:, 1:-1] = wanted
        steps = np.diff(padded.ravel())
        starts = np.flatnonzero(steps == 1)
        ends = np.flatnonzero(steps == -1)
        labels = _join(len(starts), *_touching(starts, ends, stride))
        return cls((height, width), starts, ends, labels, np.bincount(labels, ends - starts))

    def paint(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask of some of the runs, bool [h, w]."""
        # +1 where one starts, -1 after it ends, then a running sum.
        height, stride = self.shape[0], self.shape[1] + 2
        edges = np.zeros(height * stride, np.int8)
        edges[self.starts[chosen] + 1] = 1
        edges[self.ends[chosen] + 1] = -1
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
