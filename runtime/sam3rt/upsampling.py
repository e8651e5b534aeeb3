"""Bilinear resizing of logits without antialiasing, as PyTorch's ``interpolate`` does it.

Resizing is linear and separable. Columns are interpolated by one matrix product; rows then in
groups that lie between the same two input rows, each a small product whose result is thresholded
while it is still in the cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class _Axis(NamedTuple):
    """How one axis is interpolated.

    Attributes:
        lower: int64 [outputs], the first input sample of each output sample.
        upper: int64 [outputs], the second; the last input has itself.
        weights: float32 [outputs, 2], their weights.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    weights: NDArray[np.float32]


@lru_cache(maxsize=64)
def _axis(inputs: int, outputs: int) -> _Axis:
    """Half-pixel centres, clamped at the borders (``align_corners=False``)."""
    step = np.float32(inputs / outputs)
    centre = (np.arange(outputs, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    centre = np.maximum(centre, np.float32(0.0))
    lower = np.minimum(centre.astype(np.int64), inputs - 1)
    fraction = centre - lower.astype(np.float32)
    weights = np.ascontiguousarray(np.stack([1 - fraction, fraction], axis=1))
    return _Axis(lower, np.minimum(lower + 1, inputs - 1), weights)


@lru_cache(maxsize=16)
def _matrix(inputs: int, outputs: int) -> NDArray[np.float32]:
    """The same as a matrix, float32 [inputs, outputs]."""
    axis = _axis(inputs, outputs)
    matrix = np.zeros((inputs, outputs), np.float32)
    columns = np.arange(outputs)
    np.add.at(matrix, (axis.lower, columns), axis.weights[:, 0])
    np.add.at(matrix, (axis.upper, columns), axis.weights[:, 1])
    return matrix


def resize(source: NDArray[np.float32], out: NDArray[Any], threshold: float | None = None) -> None:
    """Resize a map, and threshold it on the way if asked to.

    Args:
        source: float32 [h, w], finite.
        out: [H, W] to write to: float32 values, or with a threshold 1 where a value is above it
            and 0 elsewhere, in any dtype.
        threshold: ``None`` writes values.
    """
    height, width = out.shape
    rows = len(source)
    wide = source @ _matrix(source.shape[1], width)
    axis = _axis(rows, height)
    bounds = np.searchsorted(axis.lower, np.arange(rows + 1)).tolist()
    scratch = None
    if threshold is not None:
        limit = np.float32(threshold)
        scratch = np.empty((max(np.diff(bounds)), width), np.float32)
    for row in range(rows):
        first, last = bounds[row], bounds[row + 1]
        if first == last:
            continue
        pair = wide[row : row + 2] if row + 1 < rows else wide[[row, row]]
        target = out[first:last] if scratch is None else scratch[: last - first]
        np.dot(axis.weights[first:last], pair, out=target)
        if scratch is not None:
            np.greater(target, limit, out=out[first:last], casting="unsafe")
