"""Tests of `sam3rt.overlay`: what is drawn where, from what the predictor returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from sam3rt import ImageError, InvalidInputError
from sam3rt.overlay import PALETTE, TINT, colour, draw_overlay, score_text

Pixels = NDArray[np.int64]
GREY = np.full((200, 300, 3), 128, np.uint8)


def mask_of(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (200, 300)) -> Any:
    mask = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


SQUARE = mask_of((100, 50, 200, 150))


def drawn(masks: Any, scores: Any = None, image: Any = GREY, **prompts: Any) -> Pixels:
    picture = draw_overlay(image, masks, scores, **prompts)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def near(pixel: Any, wanted: Any, tolerance: int = 12) -> bool:
    return bool(np.abs(np.asarray(pixel, int) - np.asarray(wanted, int)).max() <= tolerance)


def test_inside_is_tinted_edged_and_outside_is_untouched() -> None:
    result = drawn(SQUARE[None])
    tint = 128 + (np.array(PALETTE[0]) - 128) * TINT
    assert near(result[100, 150], tint, 1)
    assert near(result[100, 100], PALETTE[0], 40)  # the line, just inside
    assert result[100, 99].min() > 160  # the white one, just outside
    np.testing.assert_array_equal(result[:40], 128)
    np.testing.assert_array_equal(result[:, :90], 128)


def test_hole_keeps_the_photograph() -> None:
    mask = SQUARE & ~mask_of((130, 80, 170, 120))
    np.testing.assert_array_equal(drawn(mask[None])[95:105, 145:155], 128)


def test_specks_and_hairlines_show_in_the_mask_s_colour() -> None:
    result = drawn(mask_of((50, 0, 51, 200), (250, 100, 251, 101))[None])
    for y, x in ((100, 50), (100, 250)):
        red, _, blue = result[y, x]
        assert blue > red + 60


def test_outline_grows_with_the_image() -> None:
    widths = []
    for side in (64, 512, 2048):
        mask = mask_of((side // 4, side // 4, 3 * side // 4, 3 * side // 4), shape=(side, side))
        row = drawn(mask[None], image=np.full((side, side, 3), 128, np.uint8))[side // 2]
        widths.append(sum(near(pixel, PALETTE[0], 50) for pixel in row[: side // 2]))
    assert widths[0] < widths[1] < widths[2]


def test_a_mask_at_the_border_and_a_full_one_are_drawn() -> None:
    assert near(drawn(np.ones((1, 200, 300), bool))[100, 150], drawn(SQUARE[None])[100, 150])
    assert drawn(np.zeros((1, 200, 300), bool)).tolist() == GREY.tolist()


# --- what the predictor returns -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, bool, np.uint8])
def test_best_mask_of_one_object_is_drawn(dtype: Any) -> None:
    masks = np.stack([mask_of((0, 0, 20, 20)), SQUARE, mask_of((0, 150, 20, 200))]).astype(dtype)
    result = drawn(masks, np.float32([0.2, 0.9, 0.3]))
    assert near(result[100, 150], 128 + (np.array(PALETTE[0]) - 128) * TINT, 1)
    np.testing.assert_array_equal(result[:20, :20], 128)
    np.testing.assert_array_equal(result[180:, :20], 128)


def test_objects_have_colours_of_their_own_and_small_ones_lie_on_top() -> None:
    masks = np.stack([mask_of((10, 10, 30, 30)), mask_of((0, 0, 150, 200))])[:, None]
    result = drawn(masks)
    large = 128 + (np.array(PALETTE[1]) - 128) * TINT
    assert near(result[150, 100], large, 1)
    assert near(result[20, 20], large + (np.array(PALETTE[0]) - large) * TINT, 2)
    assert colour(len(PALETTE)) == PALETTE[0]


def test_labels_number_the_objects_and_clip_their_scores() -> None:
    masks = np.stack([mask_of((20, 60, 120, 150)), mask_of((180, 60, 280, 150))])[:, None]

    def picture(scores: Any, which: Any = slice(None)) -> Any:
        return drawn(masks[which], np.asarray(scores)[which])

    np.testing.assert_array_equal(picture([[1.7], [0.5]]), picture([[1.0], [0.5]]))
    np.testing.assert_array_equal(picture([[-1e30], [0.5]]), picture([[0.0], [0.5]]))
    np.testing.assert_array_equal(picture([[np.nan], [0.5]]), picture([[0.0], [0.5]]))
    assert (picture([[0.9], [0.5]]) != picture([[0.8], [0.5]])).any()
    # A lone object's label has no number, so it is narrower.
    widths = [
        dark(result)[:, :150].any(axis=0).sum()
        for result in (picture([[0.9], [0.5]], slice(1)), picture([[0.9], [0.5]]))
    ]
    assert widths[0] + 5 < widths[1]


def test_log_odds_are_shown_as_they_are() -> None:
    def picture(score: float, unit: Any) -> Any:
        return drawn(SQUARE[None], [score], score_unit=unit)

    assert score_text(6.25, "log_odds") == "log-odds 6.25"
    assert score_text(6.25, "iou") == "1.000"
    assert (picture(6.0, "log_odds") != picture(5.0, "log_odds")).any()
    np.testing.assert_array_equal(picture(6.0, "iou"), picture(5.0, "iou"))


def dark(result: Pixels) -> NDArray[np.bool_]:
    return result.max(axis=2) < 60


@pytest.mark.parametrize("corner", [(0, 0), (280, 0), (0, 180), (280, 180), (140, 90)])
def test_label_lies_whole_inside_the_image_near_its_mask(corner: tuple[int, int]) -> None:
    x, y = corner
    rows, columns = np.nonzero(dark(drawn(mask_of((x, y, x + 20, y + 20))[None], [0.875])))
    assert 15 < rows.max() - rows.min() < 40
    assert 30 < columns.max() - columns.min() < 80
    assert abs(rows.mean() - y - 10) < 60
    assert abs(columns.mean() - x - 10) < 60


def test_labels_at_one_place_do_not_cover_each_other_nor_a_click() -> None:
    masks = np.stack([SQUARE, SQUARE])[:, None]
    one, two = (dark(drawn(masks[:count], np.full((count, 1), 0.5))).sum() for count in (1, 2))
    assert two > 1.8 * one
    click = {"points": [[150, 40]], "labels": [1]}
    plain, labelled = drawn(SQUARE[None], **click), drawn(SQUARE[None], [0.5], **click)
    np.testing.assert_array_equal(plain[37:44, 147:154], labelled[37:44, 147:154])


def test_label_is_left_out_where_it_could_not_be_read() -> None:
    image = np.full((12, 12, 3), 128, np.uint8)
    mask = mask_of((2, 2, 9, 9), shape=(12, 12))[None]
    np.testing.assert_array_equal(drawn(mask, [0.5], image), drawn(mask, None, image))


# --- prompts --------------------------------------------------------------------------------------

NOTHING = np.zeros((1, 200, 300), bool)


def test_clicks_differ_by_colour_and_by_sign() -> None:
    result = drawn(NOTHING, points=[[60, 100], [240, 100]], labels=[1, 0])
    assert near(result[103, 63], (22, 170, 82), 30)
    assert near(result[103, 243], (222, 42, 52), 30)
    assert result[98:103, 60].min() > 150  # the plus has an upright bar, the minus none
    assert result[98:103, 240].min() < 100
    assert (result[:80] == 128).all()


def test_points_come_as_the_predictor_takes_them() -> None:
    flat = drawn(NOTHING, points=[[60, 100], [240, 100], [9, 9]], labels=[1, 0, -1])
    for points, labels in (
        (np.array([[[60, 100]], [[240, 100]]]), np.array([[1], [0]])),
        ([[[60, 100], [5, 5]], [[240, 100]]], [[1, -1], [0]]),
        ([np.array([[60, 100]]), np.array([[240, 100], [3, 3]])], [[1], [0, -1]]),
    ):
        np.testing.assert_array_equal(drawn(NOTHING, points=points, labels=labels), flat)


def test_boxes_are_frames_inside_their_corners_in_their_object_s_colour() -> None:
    result = drawn(NOTHING, boxes=[[20, 20, 120, 120], [160, 20, 260, 120]])
    for x, ink in ((20, PALETTE[0]), (160, PALETTE[1])):
        assert (result[60, x] == 255).all()
        assert any(near(pixel, ink, 1) for pixel in result[60, x : x + 6])
        assert (result[60, x - 1] == 128).all()
        assert (result[60, x + 50] == 128).all()
    assert (drawn(NOTHING, boxes=[50, 50, 50, 50]) != 128).any()


def test_prompts_of_several_objects_carry_their_colours_and_numbers() -> None:
    two = np.zeros((2, 1, 200, 300), bool)
    points, labels = [[[60, 100]], [[240, 100]]], [[1], [0]]
    lone = drawn(NOTHING, points=points, labels=labels)
    result = drawn(two, points=points, labels=labels)
    for number, x in enumerate((60, 240)):
        disc = result[90:111, x - 10 : x + 11].reshape(-1, 3)
        assert any(near(pixel, PALETTE[number], 40) for pixel in disc)
        assert dark(result)[:, x - 20 : x + 20].sum() > dark(lone)[:, x - 20 : x + 20].sum() + 50
    boxes = [[20, 40, 120, 120], [160, 40, 260, 120]]
    result = drawn(two, boxes=boxes)
    for x, _, _, _ in boxes:  # the chip with the number, at the upper left corner
        assert dark(result)[:60, x - 20 : x + 20].sum() > 50


@pytest.mark.parametrize("far", [-1e30, -500.0, 900.0, 1e30])
def test_prompts_far_outside_the_image_draw_nothing(far: float) -> None:
    box = [far, far, far + 1, far + 1]
    result = drawn(NOTHING, points=[[far, 10], [10, far]], labels=[1, 0], boxes=box)
    np.testing.assert_array_equal(result, GREY)


# --- arguments ------------------------------------------------------------------------------------


def test_pil_images_and_any_size_are_taken_and_left_alone() -> None:
    for height, width in ((1, 1), (1, 500), (500, 1), (3, 4)):
        array = np.full((height, width, 3), 77, np.uint8)
        before = array.copy()
        masks = np.ones((1, height, width), bool)
        picture = draw_overlay(array, masks, [0.5], points=[[0, 0]], labels=[1], boxes=[0, 0, 9, 9])
        assert picture.size == (width, height)
        np.testing.assert_array_equal(array, before)
    array = np.asarray(PIL.Image.fromarray(GREY))  # read-only
    np.testing.assert_array_equal(
        drawn(SQUARE[None], image=PIL.Image.fromarray(GREY).convert("RGBA")),
        drawn(SQUARE[None], image=array),
    )


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ((GREY, SQUARE), "masks"),
        ((GREY, SQUARE[None, :-1]), "masks"),
        ((GREY, np.zeros((1, 0, 200, 300))), "masks"),
        ((GREY, [SQUARE, SQUARE[:3]]), "masks"),
        ((GREY, "here"), "masks"),
        ((GREY, SQUARE[None], [0.5, 0.5]), "scores"),
        ((GREY, SQUARE[None], "good"), "scores"),
        ((GREY, np.stack([SQUARE] * 6).reshape(2, 3, *SQUARE.shape), np.ones((3, 2))), "scores"),
        ((GREY[..., 0], SQUARE[None]), "image"),
    ],
)
def test_wrong_argument_is_named(arguments: Any, argument: str) -> None:
    with pytest.raises((InvalidInputError, ImageError)) as caught:
        draw_overlay(*arguments)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ({"points": [[1, 2], [3, 4]], "labels": [1]}, "one label per point"),
        ({"points": "ab", "labels": [1]}, "^points: "),
        ({"points": [1, [2, 3]]}, "^points: "),
        ({"points": [[np.nan, 2]], "labels": [1]}, "finite"),
        ({"points": [1, 2], "labels": [1, [0]]}, "^labels: "),
        ({"labels": [1]}, "^points: "),
        ({"boxes": [1, 2, 3]}, "^boxes: "),
        ({"boxes": [5, 5, 2, 2]}, "x0 <= x1"),
        ({"boxes": [1, 2, np.nan, 3]}, "finite"),
        ({"score_unit": "percent"}, "score_unit: got 'percent'"),
    ],
)
def test_prompts_that_predict_would_not_take(prompts: dict[str, Any], error: str) -> None:
    image, masks = np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8), bool)
    with pytest.raises(InvalidInputError, match=error):
        draw_overlay(image, masks, [0.5], **prompts)


def test_labels_are_1_where_they_are_left_out() -> None:
    image, masks = np.zeros((40, 40, 3), np.uint8), np.zeros((1, 40, 40), bool)
    drawn = [draw_overlay(image, masks, points=[[9, 9]], labels=labels) for labels in (None, [1])]
    assert drawn[0] == drawn[1] != draw_overlay(image, masks)
