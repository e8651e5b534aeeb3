"""Bilinear resizing of logits without antialiasing, as PyTorch's ``interpolate`` does it.

Resizing is linear and separable, and so are several resizes and crops after each other: each axis
is one banded matrix, worked out once per size and never held in its dense form, which would take
gigabytes for a long side. Columns are interpolated first, by gathering the few that each mixes.
Rows are done in groups that mix the same ones, each a small matmul whose result is thresholded
while it is still in the cache.

No matmul is large enough for NumPy's library to give it to several threads (OpenBLAS; 2^18
multiplications). Its threads would then spin for a tenth of a second, waiting for more work, and on
a machine of few cores the next decoder call took half as long again (benchmarks/NOTES.md).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Half of what OpenBLAS computes on one thread (SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD).
_MAX_MULTIPLICATIONS = 1 << 17


class Resampling(NamedTuple):
    """How maps of one size become maps of another.

    Attributes:
        rows: int64 [R], the input rows that any output row mixes.
        columns: int64 [taps, W], the input columns that each output column mixes.
        column_weights: float32 [taps, W], how much it takes of each.
        weights: float32 [H, band], what each output row takes of the input rows it mixes.
        groups: (first, last, start): output rows first..last-1 mix ``rows[start:start + band]``.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    column_weights: NDArray[np.float32]
    weights: NDArray[np.float32]
    groups: tuple[tuple[int, int, int], ...]


class _Band(NamedTuple):
    """A banded matrix: output i takes ``weights[i]`` of ``start[i]`` onwards.

    Attributes:
        start: int64 [outputs].
        weights: float64 [outputs, width].
    """

    start: NDArray[np.int64]
    weights: NDArray[np.float64]

    def columns(self) -> NDArray[np.int64]:
        """The inputs that each output mixes, int64 [outputs, width]."""
        columns: NDArray[np.int64] = self.start[:, None] + np.arange(self.weights.shape[1])
        return columns


@lru_cache(maxsize=8)
def direct(source: tuple[int, int], target: tuple[int, int]) -> Resampling:
    """Resize from one (height, width) to another."""
    return _resampling(_bilinear(source[0], target[0]), _bilinear(source[1], target[1]))


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
    wide = _mix_columns(source, resampling)
    band = resampling.weights.shape[1]
    if threshold is None:
        for first, last, start in resampling.groups:
            rows = wide[start : start + band]
            np.dot(resampling.weights[first:last], rows, out=out[first:last])
        return
    limit = np.float32(threshold)
    largest = max(last - first for first, last, _ in resampling.groups)
    scratch = np.empty((largest, out.shape[1]), np.float32)
    for first, last, start in resampling.groups:
        values = scratch[: last - first]
        np.dot(resampling.weights[first:last], wide[start : start + band], out=values)
        np.greater(values, limit, out=out[first:last], casting="unsafe")


def _mix_columns(source: NDArray[np.float32], resampling: Resampling) -> NDArray[np.float32]:
    if len(resampling.rows) < len(source):
        source = source[resampling.rows]
    wide: NDArray[np.float32] | None = None
    for columns, weights in zip(resampling.columns, resampling.column_weights, strict=True):
        # "clip" changes nothing, since all are within; NumPy gathers faster where it cannot fail.
        taken = np.take(source, columns, axis=1, mode="clip")
        taken *= weights
        if wide is None:
            wide = taken
        else:
            wide += taken
    assert wide is not None
    return wide


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
    height, band = rows.weights.shape
    most = max(1, _MAX_MULTIPLICATIONS // (band * len(columns.start)))
    changes = np.flatnonzero(np.diff(rows.start)) + 1
    bounds = sorted({0, *changes.tolist(), *range(0, height, most), height})
    used = np.unique(rows.columns())
    starts = np.searchsorted(used, rows.start)
    groups = tuple((first, last, int(starts[first])) for first, last in itertools.pairwise(bounds))
    return Resampling(
        used,
        np.ascontiguousarray(columns.columns().T),
        np.ascontiguousarray(columns.weights.T, np.float32),
        np.ascontiguousarray(rows.weights, np.float32),
        groups,
    )
