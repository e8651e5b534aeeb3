"""Masks as runs, and COCO's compressed text for them, byte for byte that of pycocotools.

Runs are lengths of zeros and ones in turn, from a run of zeros that may be empty, down each column
and column after column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.int64]
_DIGITS = 13  # of five bits, enough for any int64


def runs_of(mask: NDArray[np.bool_]) -> Runs:
    """The runs of a mask, bool [H, W].

    Pixels are compared where they lie, row by row: to turn the mask first would take ten times as
    long as to sort the few places where it changes.
    """
    if not mask.size:
        return np.zeros(1, np.int64)
    height, width = mask.shape
    changes = np.empty(mask.shape, np.bool_)
    np.not_equal(mask[1:], mask[:-1], out=changes[1:])
    # Above a column lies the end of the one before, and above the first a zero.
    np.not_equal(mask[0, 1:], mask[-1, :-1], out=changes[0, 1:])
    changes[0, 0] = mask[0, 0]
    rows, columns = np.divmod(np.flatnonzero(changes), width)
    return np.diff(np.sort(columns * height + rows), prepend=0, append=mask.size)


def mask_of(runs: Runs, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of given runs, bool [H, W] for a size (H, W)."""
    ones = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(ones, runs).reshape(size[::-1]).T)


def area_of(runs: Runs) -> int:
    """Pixels in a mask."""
    return int(runs[1::2].sum())


def box_of(runs: Runs, height: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask, x1 and y1 just outside; zeros for an empty mask."""
    ends = np.cumsum(runs)
    starts, ends = ends[0 : len(runs) - 1 : 2], ends[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return 0, 0, 0, 0
    first, last = starts // height, (ends - 1) // height
    if (first != last).any():  # such a run reaches the lower edge and goes on at the upper one
        top, bottom = 0, height
    else:
        top, bottom = int((starts % height).min()), int(((ends - 1) % height).max()) + 1
    return int(first.min()), top, int(last.max()) + 1, bottom


def box_around(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around a mask, x1 and y1 just outside; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def compress(runs: Runs) -> str:
    """COCO's text for runs.

    From the fourth run on, what is written is the difference from the last run of the same kind.
    Numbers are written five bits at a time, the lowest first; a sixth bit says that more follow.
    """
    rest = runs.astype(np.int64)
    rest[3:] -= runs[1:-2]
    codes = np.zeros((len(rest), _DIGITS), np.uint8)
    unfinished = np.ones(len(rest), np.bool_)
    for place in range(_DIGITS):
        digit = rest & 31
        rest >>= 5
        more = np.where(digit & 16, rest != -1, rest != 0)
        codes[:, place] = np.where(unfinished, 48 + digit + 32 * more, 0)
        unfinished &= more
        if not unfinished.any():
            break
    flat = codes.ravel()
    return str(flat[flat != 0].tobytes(), "ascii")


def decompress(text: str) -> Runs:
    """The runs that :func:`compress` wrote.

    Raises:
        ValueError: it is not such a text.
    """
    digits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("not a compressed run-length encoding of COCO")
    starts = np.flatnonzero(np.concatenate([[True], (digits[:-1] & 32) == 0]))
    lengths = np.diff(np.concatenate([starts, [len(digits)]]))
    if lengths.max() >= _DIGITS:
        raise ValueError("not a compressed run-length encoding of COCO: a number is too long")
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = (digits[starts + lengths - 1] & 16) != 0
    runs -= np.where(negative, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
