"""Bilinear resizing of logits without antialiasing, as PyTorch's ``interpolate`` does it.

Resizing is linear and separable, and so are several resizes and crops after each other: each axis
is one banded matrix, worked out once per size. Columns are interpolated first, by gathering the few
that each mixes. Rows are done in groups that mix the same ones, each a small product whose result
is thresholded while it is still in the cache.

No product is large enough for NumPy's library to give it to several threads (OpenBLAS; 2^18
multiplications): its threads then spin in wait of more for a tenth of a second, and on a machine of
few cores the next decoder call took half as long again (benchmarks/NOTES.md).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Half of what OpenBLAS computes on one thread (SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD).
_MAX_MULTIPLICATIONS = 1 << 17


class Resampling(NamedTuple):
    """How maps of one size become maps of another.

    Attributes:
        columns: int64 [taps, W], the input columns that each output column mixes.
        column_weights: float32 [taps, W], how much it takes of each.
        weights: float32 [H, band], what each output row takes of the input rows it mixes.
        groups: (first, last, start): output rows first..last-1 mix input rows start..start+band-1.
    """

    columns: NDArray[np.int64]
    column_weights: NDArray[np.float32]
    weights: NDArray[np.float32]
    groups: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=8)
def direct(source: tuple[int, int], target: tuple[int, int]) -> Resampling:
    """Resize from one (height, width) to another."""
    return _resampling(_bilinear(source[0], target[0]), _bilinear(source[1], target[1]))


@lru_cache(maxsize=8)
def unpadded(
    source: tuple[int, int], padded: tuple[int, int], kept: tuple[int, int], target: tuple[int, int]
) -> Resampling:
    """Resize to ``padded``, crop to ``kept`` from the top left, resize to ``target``."""
    return _resampling(*_unpadding(source, padded, kept, target))


def upsampling_matrices(
    source: tuple[int, int],
    padded: tuple[int, int],
    kept: tuple[int, int],
    target: tuple[int, int],
    upsampling: Literal["direct", "unpad"],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """:func:`direct` or :func:`unpadded` as one matrix for either axis.

    Args:
        source: (height, width) of the logits.
        padded: (height, width) of the encoder's input.
        kept: (height, width) of the part of it that the image fills.
        target: (height, width) of the image.
        upsampling: see :class:`sam3rt.bundle.MaskSpec`.

    Returns:
        Float32 [height of the image, height of the logits] and [width of the logits, width of
        the image].
    """
    if upsampling == "direct":
        rows, columns = _bilinear(source[0], target[0]), _bilinear(source[1], target[1])
    else:
        rows, columns = _unpadding(source, padded, kept, target)
    return rows.astype(np.float32), np.ascontiguousarray(columns.T, np.float32)


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


def _unpadding(
    source: tuple[int, int], padded: tuple[int, int], kept: tuple[int, int], target: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = (
        _interpolate(_bilinear(source[axis], padded[axis])[: kept[axis]], target[axis])
        for axis in (0, 1)
    )
    return rows, columns


def _bilinear(inputs: int, outputs: int) -> NDArray[np.float64]:
    """One axis as a matrix [outputs, inputs]."""
    return _interpolate(np.eye(inputs), outputs)


def _interpolate(values: NDArray[np.float64], outputs: int) -> NDArray[np.float64]:
    """Resize the first axis: half-pixel centres, clamped at the borders.

    Positions are rounded as PyTorch's are (``area_pixel_compute_source_index``, compiled to one
    fused multiply-add): the step to float32, then the position, once. That agrees with PyTorch
    to 1e-6 where exact positions differ by 2e-4.
    """
    inputs = len(values)
    step = np.float64(np.float32(inputs / outputs))
    centre = (step * (np.arange(outputs) + 0.5) - 0.5).astype(np.float32)
    centre = np.maximum(centre, np.float32(0.0))
    lower = np.minimum(centre.astype(np.int64), inputs - 1)
    upper = np.minimum(lower + 1, inputs - 1)
    fraction = (centre - lower.astype(np.float32))[:, None].astype(np.float64)
    result: NDArray[np.float64] = values[lower] * (1 - fraction) + values[upper] * fraction
    return result


def _resampling(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Resampling:
    """From one matrix per axis, [H, h] and [W, w]."""
    start, weights = _band(rows)
    first_column, column_weights = _band(columns)
    taps = np.arange(column_weights.shape[1])
    most = max(1, _MAX_MULTIPLICATIONS // (weights.shape[1] * len(columns)))
    changes = np.flatnonzero(np.diff(start)) + 1
    bounds = sorted({0, *changes.tolist(), *range(0, len(rows), most), len(rows)})
    groups = tuple((first, last, int(start[first])) for first, last in itertools.pairwise(bounds))
    return Resampling(
        np.ascontiguousarray((first_column[:, None] + taps).T),
        np.ascontiguousarray(column_weights.T, np.float32),
        np.ascontiguousarray(weights, np.float32),
        groups,
    )


def _band(matrix: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The part of each row that is not zero: where it starts, and its values, of equal length."""
    inputs = matrix.shape[1]
    used = matrix != 0
    start = used.argmax(axis=1)
    end = inputs - used[:, ::-1].argmax(axis=1)
    band = int((end - start).max())
    start = np.minimum(start, inputs - band)
    return start, np.take_along_axis(matrix, start[:, None] + np.arange(band), axis=1)
