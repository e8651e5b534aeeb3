"""Runs of masks, and their text against pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from pycocotools import mask as coco
from tests.support.helpers import any_masks, examples

from sam3rt.masks.rle import area_of, box_around, box_of, compress, decompress, mask_of, runs_of


@given(mask=any_masks())
@examples(300)
def test_text_is_that_of_pycocotools(mask: NDArray[np.bool_]) -> None:
    runs = runs_of(mask)
    text = compress(runs)
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert text == theirs["counts"].decode()
    np.testing.assert_array_equal(decompress(text), runs)
    np.testing.assert_array_equal(mask_of(runs, mask.shape), mask)
    assert area_of(runs) == coco.area(theirs)
    box = np.array(box_of(runs, mask.shape[0]))
    assert tuple(box) == box_around(mask)
    x, y, width, height = coco.toBbox(theirs)
    assert box.tolist() == ([x, y, x + width, y + height] if mask.any() else [0, 0, 0, 0])


def test_long_runs_are_written_rightly() -> None:
    mask = np.zeros((3000, 4000), bool)
    mask[:, 1] = mask[5:2000, 2000] = mask[-1, -1] = True
    text = compress(runs_of(mask))
    assert text == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(mask_of(decompress(text), mask.shape), mask)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_a_mask_without_pixels_is_one_empty_run(shape: tuple[int, int]) -> None:
    assert runs_of(np.zeros(shape, bool)).tolist() == [0]


def test_a_mask_of_any_memory_order_has_the_same_runs() -> None:
    mask = np.random.default_rng(0).random((40, 30)) < 0.5
    turned = np.asfortranarray(mask)
    np.testing.assert_array_equal(runs_of(turned), runs_of(mask))
    np.testing.assert_array_equal(runs_of(mask[::2, ::-1]), runs_of(mask[::2, ::-1].copy()))


@pytest.mark.parametrize("text", ["", "P", " ", "z", "o" * 14 + "0", "ä"])
def test_other_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - UnicodeEncodeError is one
        decompress(text)
