"""Outlines enclose their masks' pixels and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from tests.support.helpers import any_masks, examples

from sam3rt.masks.polygons import Ring, joined, outlines, signed_area


def filled(rings: list[Ring], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels whose centre lies within an odd number of turns, for rings along pixels' edges."""
    crossings = np.zeros((shape[0], shape[1] + 1), np.bool_)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            assert x0 == x1 or y0 == y1
            if x0 == x1:
                crossings[int(min(y0, y1)) : int(max(y0, y1)), int(x0)] ^= True
    inside: NDArray[np.bool_] = np.logical_xor.accumulate(crossings, axis=1)[:, :-1]
    return inside


@given(mask=any_masks())
@examples(300)
def test_outlines_enclose_the_mask_and_nothing_else(mask: NDArray[np.bool_]) -> None:
    rings = outlines(mask)
    np.testing.assert_array_equal(filled(rings, mask.shape), mask)
    areas = [signed_area(ring) for ring in rings]
    assert sum(areas) == mask.sum()
    assert [abs(area) for area in areas] == sorted(map(abs, areas), reverse=True)
    for ring in rings:  # every point is a corner, named once
        ahead, behind = np.roll(ring, -1, axis=0) - ring, ring - np.roll(ring, 1, axis=0)
        assert ((ahead != 0) != (behind != 0)).all()
    if rings:
        assert signed_area(joined(rings)) == pytest.approx(mask.sum())


def test_a_pixel_has_four_corners_and_runs_clockwise() -> None:
    mask = np.zeros((5, 5), bool)
    mask[1, 2] = True
    (ring,) = outlines(mask)
    assert ring.tolist() == [[2, 1], [3, 1], [3, 2], [2, 2]]


def test_a_hole_is_an_outline_of_its_own_that_runs_the_other_way() -> None:
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    mask[4, 4] = True
    assert [signed_area(ring) for ring in outlines(mask)] == [81, -9, 1]


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_touch_at_a_corner_belong_together(turned: bool) -> None:
    mask = np.eye(2, dtype=bool)
    rings = outlines(mask[::-1] if turned else mask)
    assert [len(ring) for ring in rings] == [8]


def test_a_tolerance_leaves_few_points_near_the_outline() -> None:
    y, x = np.mgrid[:300, :400]
    mask = np.hypot(x - 200, y - 150) < 100
    (exact,), (near,) = outlines(mask), outlines(mask, 1.0)
    assert len(exact) > 300
    assert len(near) < 60
    assert signed_area(near) == pytest.approx(mask.sum(), rel=0.01)
    assert set(map(tuple, near)) <= set(map(tuple, exact))
    for a, b in zip(near, np.roll(near, -1, axis=0), strict=True):
        start, end = ((exact == point).all(axis=1).argmax() for point in (a, b))
        between = np.roll(exact, -start, axis=0)[: (end - start) % len(exact) + 1]
        line, offset = b - a, between - a
        distance = abs(line[0] * offset[:, 1] - line[1] * offset[:, 0]) / np.hypot(*line)
        assert distance.max() <= 1.0


def test_what_is_thinner_than_the_tolerance_is_left_out() -> None:
    mask = np.zeros((20, 20), bool)
    mask[3, 2:18] = True
    assert outlines(mask, 2.0) == []
