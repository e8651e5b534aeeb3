"""Bilinear resizing of logits without antialiasing, as PyTorch's ``interpolate`` does it.

Resizing is linear and separable, and so are several resizes and crops after each other: each axis
is one banded matrix, worked out once per size and never held in its dense form, which would take
gigabytes for a long side. Neighbouring outputs mix almost the same inputs, so an axis is resized in
groups of neighbours, each a small matmul. Columns come first; a group of rows is thresholded while
it is still in the cache.

No matmul is large enough for NumPy's library to give it to several threads (OpenBLAS; 2^18
multiplications). Its threads would then spin for a tenth of a second, waiting for more work, and on
a machine of few cores the next decoder call took half as long again (benchmarks/NOTES.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Half of what OpenBLAS computes on one thread (SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD).
_MAX_MULTIPLICATIONS = 1 << 17
# Outputs of a group. More would mix inputs further apart, of which each takes nothing.
_MAX_OUTPUTS = 64


class Group(NamedTuple):
    """Neighbouring outputs of an axis and the inputs that they mix.

    Attributes:
        outputs: which they are.
        inputs: which they mix.
        weights: float32 [outputs, inputs], how much each takes of each.
    """

    outputs: slice
    inputs: slice
    weights: NDArray[np.float32]


class Resampling(NamedTuple):
    """How maps of one size become maps of another.

    Attributes:
        used: int64 [R], the input rows that any output row mixes.
        rows: the output rows, in order, by what they mix of ``used``.
        columns: the output columns, in order.
    """

    used: NDArray[np.int64]
    rows: tuple[Group, ...]
    columns: tuple[Group, ...]


class _Band(NamedTuple):
    """A banded matrix: output i takes ``weights[i]`` of ``start[i]`` onwards.

    Attributes:
        start: int64 [outputs].
        weights: float64 [outputs, width].
    """

    start: NDArray[np.int64]
    weights: NDArray[np.float64]


@lru_cache(maxsize=8)
def direct(source: tuple[int, int], target: tuple[int, int]) -> Resampling:
    """Resize from one (height, width) to another."""
    rows, columns = (_bilinear(*sides) for sides in zip(source, target, strict=True))
    return _resampling(rows, columns)


@lru_cache(maxsize=8)
def unpadded(
    source: tuple[int, int], padded: tuple[int, int], kept: tuple[int, int], target: tuple[int, int]
) -> Resampling:
    """Resize to ``padded``, crop to ``kept`` from the top left, resize to ``target``."""
    rows, columns = (
        _unpadded_axis(*sides) for sides in zip(source, padded, kept, target, strict=True)
    )
    return _resampling(rows, columns)


def resize(
    source: NDArray[np.float32],
    resampling: Resampling,
    out: NDArray[Any],
    threshold: float | None = None,
) -> None:
    """Resize a map, and threshold it on the way if asked to.

    Args:
        source: float32 [h, w], finite.
        resampling: for its size and that of ``out``.
        out: [H, W] to write to: float32 values, or with a threshold 1 where a value is above it
            and 0 elsewhere, in any dtype.
        threshold: ``None`` writes values.
    """
    if len(resampling.used) < len(source):
        source = source[resampling.used]
    wide = np.empty((len(source), out.shape[1]), np.float32)
    for group in resampling.columns:
        np.matmul(source[:, group.inputs], group.weights.T, out=wide[:, group.outputs])
    if threshold is None:
        for group in resampling.rows:
            np.matmul(group.weights, wide[group.inputs], out=out[group.outputs])
        return
    limit = np.float32(threshold)
    largest = max(len(group.weights) for group in resampling.rows)
    scratch = np.empty((largest, out.shape[1]), np.float32)
    for group in resampling.rows:
        values = scratch[: len(group.weights)]
        np.matmul(group.weights, wide[group.inputs], out=values)
        np.greater(values, limit, out=out[group.outputs], casting="unsafe")


def _unpadded_axis(source: int, padded: int, kept: int, target: int) -> _Band:
    """Resize one axis to ``padded``, keep its first ``kept``, resize these to ``target``."""
    first, second = _bilinear(source, padded), _bilinear(kept, target)
    # An output mixes two neighbours, each of which mixes two inputs.
    shift = int(np.diff(first.start[:kept]).max(initial=0))
    start = first.start[second.start]
    weights = np.zeros((target, 2 + shift))
    for tap in range(second.weights.shape[1]):
        neighbour = second.start + tap
        offset = first.start[neighbour] - start
        for inner in range(first.weights.shape[1]):
            share = first.weights[neighbour, inner] * second.weights[:, tap]
            weights[np.arange(target), offset + inner] += share
    return _trimmed(source, start, weights)


def _bilinear(inputs: int, outputs: int) -> _Band:
    """Resize one axis: half-pixel centres, clamped at the borders.

    Positions are rounded as PyTorch's are (``area_pixel_compute_source_index``, compiled to one
    fused multiply-add): the step to float32, then the position, once. That agrees with PyTorch
    to 1e-6 where exact positions differ by 2e-4.
    """
    step = np.float64(np.float32(inputs / outputs))
    centre = (step * (np.arange(outputs) + 0.5) - 0.5).astype(np.float32)
    centre = np.maximum(centre, np.float32(0.0))
    lower = np.minimum(centre.astype(np.int64), inputs - 1)
    fraction = (centre - lower.astype(np.float32)).astype(np.float64)
    # The last input has no neighbour above it, and takes the whole weight.
    fraction[lower == inputs - 1] = 0.0
    return _trimmed(inputs, lower, np.stack([1 - fraction, fraction], axis=1))


def _trimmed(inputs: int, start: NDArray[np.int64], weights: NDArray[np.float64]) -> _Band:
    """A band without the columns on its right that are zero in every row, within its inputs."""
    width = int(np.flatnonzero(weights.any(axis=0))[-1]) + 1
    weights = weights[:, :width]
    # A row that would reach past the last input starts earlier, behind zeros.
    excess = np.maximum(start + width - inputs, 0)
    source = np.arange(width) - excess[:, None]
    shifted = np.take_along_axis(weights, np.maximum(source, 0), axis=1)
    return _Band(start - excess, np.where(source >= 0, shifted, 0.0))


def _resampling(rows: _Band, columns: _Band) -> Resampling:
    """From one band per axis."""
    used = np.unique(rows.start[:, None] + np.arange(rows.weights.shape[1]))
    rows = _Band(np.searchsorted(used, rows.start), rows.weights)
    return Resampling(used, _groups(rows, len(columns.start)), _groups(columns, len(used)))


def _groups(band: _Band, other: int) -> tuple[Group, ...]:
    """Outputs in groups, each as large as a matmul may be with so many of the other axis."""
    start, width = band.start.tolist(), band.weights.shape[1]
    most = _MAX_MULTIPLICATIONS // other
    groups, first = [], 0
    while first < len(start):
        end = min(len(start), first + _MAX_OUTPUTS)
        last = first + 1
        while last < end and (last + 1 - first) * (start[last] + width - start[first]) <= most:
            last += 1
        inputs = slice(start[first], start[last - 1] + width)
        weights = np.zeros((last - first, inputs.stop - inputs.start), np.float32)
        column = band.start[first:last, None] - start[first] + np.arange(width)
        np.put_along_axis(weights, column, band.weights[first:last].astype(np.float32), axis=1)
        groups.append(Group(slice(first, last), inputs, weights))
        first = last
    return tuple(groups)
