"""Tests of `sam3rt.overlay`: what must change in the picture, and what must not."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sam3rt.overlay import TINT_ALPHA, draw_overlay, mask_colour

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

GREY = 128


def grey_image(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def no_masks(height: int, width: int) -> Mask:
    return np.zeros((0, height, width), dtype=bool)


def disc(height: int, width: int, x: float, y: float, radius: float) -> Mask:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 < radius**2)


def drawn(*args: Any, **kwargs: Any) -> npt.NDArray[np.int64]:
    """Return the overlay as signed integers, so that differences do not wrap around."""
    return np.asarray(draw_overlay(*args, **kwargs)).astype(np.int64)


def changed(overlay: npt.NDArray[np.int64]) -> Mask:
    return np.asarray((overlay != GREY).any(axis=2))


def tint(value: npt.ArrayLike, colour: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    return np.asarray(value) * (1 - TINT_ALPHA) + np.array(colour) * TINT_ALPHA


# --- masks ----------------------------------------------------------------------------------------


def test_returns_rgb_image_of_the_same_size() -> None:
    result = draw_overlay(grey_image(30, 50), no_masks(30, 50))
    assert isinstance(result, Image.Image)
    assert (result.mode, result.size) == ("RGB", (50, 30))


def test_without_anything_to_draw_the_image_is_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    empty = np.zeros((2, 20, 30), dtype=bool)
    np.testing.assert_array_equal(drawn(image, empty, scores=[0.5, 0.7]), image)


def test_inside_is_tinted_and_outside_is_untouched() -> None:
    mask = disc(200, 300, 150, 100, 60)
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    result = drawn(image, mask[None])
    inside, outside = disc(200, 300, 150, 100, 54), ~disc(200, 300, 150, 100, 66)
    expected = image * (1 - TINT_ALPHA) + np.array(mask_colour(0)) * TINT_ALPHA
    np.testing.assert_allclose(result[inside], expected[inside], atol=0.51)
    np.testing.assert_array_equal(result[outside], image[outside])


def test_hole_keeps_the_photograph() -> None:
    mask = disc(200, 200, 100, 100, 80) & ~disc(200, 200, 100, 100, 30)
    result = drawn(grey_image(200, 200), mask[None])
    assert not changed(result)[disc(200, 200, 100, 100, 25)].any()


def test_outline_is_coloured_inside_and_white_outside() -> None:
    mask = np.zeros((400, 400), dtype=bool)
    mask[100:300, 100:300] = True
    row = drawn(grey_image(400, 400), mask[None])[200]
    np.testing.assert_allclose(row[100], mask_colour(0), atol=40)
    assert row[99].min() > 200
    np.testing.assert_allclose(row[110], tint(GREY, mask_colour(0)), atol=1)


@pytest.mark.parametrize("side", [64, 512, 2048])
def test_outline_grows_with_the_image(side: int) -> None:
    mask = np.zeros((side, side), dtype=bool)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
    row = drawn(grey_image(side, side), mask[None])[side // 2, : side // 2]
    outline = changed(row[None])[0] & (np.abs(row - tint(GREY, mask_colour(0))) > 1).any(axis=1)
    assert 2 <= outline.sum() <= 4 + side / 200
    assert outline.sum() >= side / 400


def test_outline_closes_along_the_image_border() -> None:
    side = 300
    result = drawn(grey_image(side, side), np.ones((1, side, side), dtype=bool))
    straight = slice(2, -2)  # the line rounds the corners of the image
    border = np.concatenate(
        [result[0, straight], result[-1, straight], result[straight, 0], result[straight, -1]]
    )
    assert border.min() > 220
    ring = np.concatenate([result[1, 5:-5], result[-2, 5:-5], result[5:-5, 1], result[5:-5, -2]])
    np.testing.assert_allclose(ring, np.broadcast_to(mask_colour(0), ring.shape), atol=40)
    np.testing.assert_allclose(result[150, 150], tint(GREY, mask_colour(0)), atol=1)


def test_sliver_along_the_border_is_still_drawn_in_its_colour() -> None:
    mask = np.zeros((300, 300), dtype=bool)
    mask[0] = True
    result = drawn(grey_image(300, 300), mask[None])
    blue_over_red = result[0, :, 2] - result[0, :, 0]
    assert (blue_over_red[10:-10] > 30).all()


def test_outlines_of_nested_masks_all_show_whatever_their_order() -> None:
    large, small = disc(300, 300, 150, 150, 120), disc(300, 300, 150, 150, 50)
    for masks in ([large, small], [small, large]):
        result = drawn(grey_image(300, 300), np.stack(masks))
        for index, mask in enumerate(masks):
            edge_y = int(np.flatnonzero(mask[:, 150])[0])
            np.testing.assert_allclose(result[edge_y, 150], mask_colour(index), atol=60)


def test_smaller_mask_lies_on_top_whatever_the_order() -> None:
    large, small = disc(300, 300, 150, 150, 120), disc(300, 300, 150, 150, 50)
    for masks, order in (([large, small], [0, 1]), ([small, large], [1, 0])):
        expected: Any = GREY
        for index in order:
            expected = tint(expected, mask_colour(index))
        result = drawn(grey_image(300, 300), np.stack(masks))
        np.testing.assert_allclose(result[150, 150], expected, atol=1.5)


def test_specks_and_hairlines_show_in_the_colour_of_the_mask() -> None:
    mask = np.zeros((300, 300), dtype=bool)
    mask[40, 50] = mask[200, 20:280] = True
    for shade in (0, 255):
        image = np.full((300, 300, 3), shade, dtype=np.uint8)
        result = drawn(image, mask[None])
        for pixel in (result[40, 50], result[200, 150]):
            np.testing.assert_allclose(pixel, mask_colour(0), atol=60)


def test_full_mask_of_a_tiny_image_is_outlined() -> None:
    result = drawn(grey_image(3, 3), np.ones((1, 3, 3), dtype=bool))
    np.testing.assert_allclose(result[0, 1], mask_colour(0), atol=40)


def test_masks_have_colours_of_their_own() -> None:
    colours = [mask_colour(i) for i in range(40)]
    assert len(set(colours)) == 40
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    for a, b in itertools.combinations(colours[:7], 2):
        assert np.abs(np.subtract(a, b)).sum() > 60


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "strongest"), [(1, 1), (0, 0)])
def test_click_has_its_colour_and_a_white_rim(label: int, strongest: int) -> None:
    result = drawn(
        grey_image(400, 400),
        no_masks(400, 400),
        points=np.array([[200.5, 120.5]]),
        labels=np.array([label]),
    )
    touched = changed(result)
    rows, columns = np.nonzero(touched)
    assert (rows.mean(), columns.mean()) == pytest.approx((120, 200), abs=0.5)
    assert 8 <= np.ptp(rows) + 1 <= 20
    pixels = result[touched]
    vivid = np.ptp(pixels, axis=1) > 90
    assert (pixels[vivid].argmax(axis=1) == strongest).all()
    assert vivid.sum() > 20
    assert (pixels.min(axis=1) > 230).sum() > 10


def test_ignored_click_has_no_hue() -> None:
    result = drawn(
        grey_image(400, 400),
        no_masks(400, 400),
        points=np.array([[200.0, 120.0]]),
        labels=np.array([-1]),
    )
    assert changed(result).any()
    assert np.ptp(result, axis=2).max() < 20


def test_clicks_are_told_apart_without_colour() -> None:
    pictures = [
        drawn(
            grey_image(400, 400),
            no_masks(400, 400),
            points=np.array([[200.0, 200.0]]),
            labels=np.array([label]),
        )
        for label in (1, 0, -1)
    ]
    signs = [(picture.min(axis=2) > 230)[198:203, 190:211] for picture in pictures]
    for a, b in itertools.combinations(signs, 2):
        assert (a != b).sum() >= 4


def test_box_is_a_frame_inside_its_corners() -> None:
    result = drawn(
        grey_image(200, 300), no_masks(200, 300), boxes=np.array([[40.0, 30.0, 240.0, 150.0]])
    )
    touched = changed(result)
    rows, columns = np.nonzero(touched)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (40, 30, 240, 150)
    assert not touched[40:140, 50:230].any()
    green = (result[..., 1] > result[..., 0] + 60) & touched
    assert green[90].sum() >= 2
    assert green[:, 140].sum() >= 2


def test_box_corners_may_come_in_any_order() -> None:
    image, masks = grey_image(100, 100), no_masks(100, 100)
    a = drawn(image, masks, boxes=np.array([[20.0, 30.0, 70.0, 80.0]]))
    b = drawn(image, masks, boxes=np.array([[70.0, 30.0, 20.0, 80.0]]))
    np.testing.assert_array_equal(a, b)


def test_box_of_no_size_still_shows() -> None:
    result = drawn(grey_image(100, 100), no_masks(100, 100), boxes=np.array([[50.0] * 4]))
    assert changed(result)[45:60, 45:60].any()


def test_edges_of_a_box_outside_the_image_are_not_drawn() -> None:
    result = drawn(
        grey_image(100, 100), no_masks(100, 100), boxes=np.array([[-1e30, -50.0, 40.0, 1e30]])
    )
    touched = changed(result)
    assert touched[:, 30:40].any(axis=1).all()
    assert not touched[:, :30].any()
    assert not touched[:, 40:].any()


def test_prompts_far_outside_the_image_draw_nothing() -> None:
    far = [-1e300, -500.0, 1e300]
    points = np.array([[x, y] for x in far for y in far])
    boxes = np.array([[-300.0, -300.0, -200.0, -200.0], [1e300, 1e300, 1e305, 1e305]])
    result = drawn(
        grey_image(50, 60),
        no_masks(50, 60),
        points=points,
        labels=np.ones(len(points), dtype=np.int64),
        boxes=boxes,
    )
    assert not changed(result).any()


def test_click_on_the_border_is_clipped() -> None:
    result = drawn(
        grey_image(100, 100),
        no_masks(100, 100),
        points=np.array([[0.0, 0.0]]),
        labels=np.array([1]),
    )
    assert changed(result)[:3, :3].all()
    assert not changed(result)[20:].any()
    assert not changed(result)[:, 20:].any()


# --- scores ---------------------------------------------------------------------------------------


def chip_pixels(image: Pixels, masks: Mask, scores: list[float]) -> Mask:
    difference = drawn(image, masks, scores=scores) != drawn(image, masks)
    return np.asarray(difference.any(axis=2))


@pytest.mark.parametrize(("x", "y"), [(0, 0), (299, 0), (150, 0), (0, 199), (299, 199), (150, 100)])
def test_label_lies_whole_inside_the_image_near_its_mask(x: int, y: int) -> None:
    image, masks = grey_image(200, 300), disc(200, 300, x, y, 25)[None]
    rows, columns = np.nonzero(chip_pixels(image, masks, [0.5]))
    reference = chip_pixels(image, disc(200, 300, 150, 100, 25)[None], [0.5])
    assert len(rows) == pytest.approx(reference.sum(), rel=0.05)
    gap_x = max(columns.min() - x, x - columns.max(), 0)
    gap_y = max(rows.min() - y, y - rows.max(), 0)
    assert max(gap_x, gap_y) < 40


def test_label_is_light_text_on_a_dark_chip() -> None:
    image, masks = grey_image(400, 400), disc(400, 400, 200, 200, 60)[None]
    pixels = drawn(image, masks, scores=[0.994])[chip_pixels(image, masks, [0.994])]
    brightness = pixels.mean(axis=1)
    assert (brightness < 60).mean() > 0.4
    assert (brightness > 200).sum() > 20


def test_label_shows_the_score() -> None:
    image, masks = grey_image(400, 400), disc(400, 400, 200, 200, 60)[None]
    high, same, low = (drawn(image, masks, scores=[value]) for value in (0.9941, 0.9939, 0.123))
    np.testing.assert_array_equal(high, same)
    assert (high != low).any()


def test_labels_of_masks_at_one_place_do_not_cover_each_other() -> None:
    mask = disc(400, 400, 200, 200, 60)
    single = chip_pixels(grey_image(400, 400), mask[None], [0.5]).sum()
    three = chip_pixels(grey_image(400, 400), np.stack([mask] * 3), [0.5] * 3).sum()
    assert three >= 2.9 * single


def test_label_does_not_cover_a_click() -> None:
    image, masks = grey_image(400, 400), disc(400, 400, 200, 200, 60)[None]
    prompt: dict[str, Any] = {"points": np.array([[200.0, 128.0]]), "labels": np.array([1])}
    bare = drawn(image, masks, **prompt)
    labelled = drawn(image, masks, scores=[0.5], **prompt)
    click = (bare != drawn(image, masks)).any(axis=2)
    np.testing.assert_array_equal(labelled[click], bare[click])
    assert (labelled != bare).any()


def test_only_masks_with_pixels_get_a_label() -> None:
    mask = disc(200, 200, 100, 120, 40)
    both = np.stack([np.zeros_like(mask), mask])
    one_label = chip_pixels(grey_image(200, 200), both, [0.25, 0.5]).sum()
    assert one_label == pytest.approx(
        chip_pixels(grey_image(200, 200), mask[None], [0.5]).sum(), rel=0.05
    )


def test_label_is_left_out_where_it_could_not_be_read() -> None:
    assert not chip_pixels(grey_image(8, 8), np.ones((1, 8, 8), dtype=bool), [0.5]).any()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1e300, 12345.678])
def test_odd_scores_are_shown_too(score: float) -> None:
    image, masks = grey_image(200, 200), disc(200, 200, 100, 100, 40)[None]
    assert chip_pixels(image, masks, [score]).any()


# --- arguments ------------------------------------------------------------------------------------


def test_arguments_are_not_modified() -> None:
    arguments: dict[str, Any] = {
        "image": grey_image(60, 80),
        "masks": np.stack([disc(60, 80, 30, 30, 20), np.ones((60, 80), dtype=bool)]),
        "points": np.array([[30.0, 30.0], [-5.0, 90.0]]),
        "labels": np.array([1, 0]),
        "boxes": np.array([[70.0, 5.0, 10.0, 50.0]]),
    }
    before = {name: array.copy() for name, array in arguments.items()}
    for array in arguments.values():
        array.flags.writeable = False
    draw_overlay(scores=[0.9, 0.1], **arguments)
    for name, array in arguments.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_result_does_not_share_memory_with_the_image() -> None:
    image = grey_image(10, 10)
    result = draw_overlay(image, no_masks(10, 10))
    image[:] = 0
    assert (np.asarray(result) == GREY).all()


def test_views_draw_like_copies() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 80, 60), dtype=np.uint8).T
    masks = np.stack([disc(80, 60, 30, 40, 20), disc(80, 60, 10, 70, 25)], axis=2)
    masks = masks[::-1].transpose(2, 1, 0)
    expected = drawn(image.copy(order="C"), masks.copy(order="C"), scores=[0.1, 0.2])
    np.testing.assert_array_equal(drawn(image, masks, scores=[0.1, 0.2]), expected)


def test_integer_coordinates_draw_like_floats() -> None:
    image, masks, labels = grey_image(100, 100), no_masks(100, 100), np.array([1], dtype=np.int32)
    points, boxes = np.array([[40, 50]]), np.array([[10, 20, 90, 80]])
    np.testing.assert_array_equal(
        drawn(image, masks, points=points, labels=labels, boxes=boxes),
        drawn(image, masks, points=points / 1.0, labels=labels, boxes=boxes / 1.0),
    )


POINTS = np.zeros((2, 2))
LABELS = np.array([1, 0])


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("image", {"image": np.zeros((9, 9, 3))}, ["float64", "uint8"]),
        ("image", {"image": np.zeros((9, 9), np.uint8)}, ["(9, 9)", "[H, W, 3]"]),
        ("image", {"image": np.zeros((9, 9, 4), np.uint8)}, ["(9, 9, 4)"]),
        ("image", {"image": np.zeros((0, 9, 3), np.uint8)}, ["(0, 9, 3)"]),
        ("image", {"image": [[[0, 0, 0]]]}, ["list"]),
        ("masks", {"masks": np.zeros((1, 9, 9), np.uint8)}, ["uint8", "bool"]),
        ("masks", {"masks": np.zeros((9, 9), bool)}, ["(9, 9)", "[M, 9, 9]"]),
        ("masks", {"masks": np.zeros((1, 9, 8), bool)}, ["(1, 9, 8)", "[M, 9, 9]"]),
        ("masks", {"masks": None}, ["NoneType"]),
        ("scores", {"scores": [0.5, 0.5]}, ["got 2", "expected 1"]),
        ("scores", {"scores": ["high"]}, ["high", "numbers"]),
        ("scores", {"scores": 0.5}, ["0.5", "sequence"]),
        ("points", {"points": np.zeros((2, 3)), "labels": LABELS}, ["(2, 3)", "[N, 2]"]),
        ("points", {"points": np.zeros(2), "labels": LABELS}, ["(2,)"]),
        ("points", {"points": np.zeros((2, 2), complex), "labels": LABELS}, ["complex128"]),
        ("points", {"points": POINTS * np.nan, "labels": LABELS}, ["nan", "row 0", "finite"]),
        ("labels", {"points": POINTS}, ["None", "one label per point"]),
        ("labels", {"labels": LABELS}, ["got 2", "expected 0"]),
        ("labels", {"points": POINTS, "labels": LABELS[:1]}, ["got 1", "expected 2"]),
        ("labels", {"points": POINTS, "labels": LABELS / 1.0}, ["float64", "integer"]),
        ("labels", {"points": POINTS, "labels": LABELS[:, None]}, ["(2, 1)", "[N]"]),
        ("labels", {"points": POINTS, "labels": LABELS + 6}, ["got 6", "1, 0 and -1"]),
        ("boxes", {"boxes": np.zeros((1, 2))}, ["(1, 2)", "4]"]),
        ("boxes", {"boxes": np.array([[0, 0, 1, np.inf]])}, ["inf", "row 0", "finite"]),
    ],
)
def test_wrong_argument_is_named(name: str, arguments: dict[str, Any], parts: list[str]) -> None:
    valid: dict[str, Any] = {"image": grey_image(9, 9), "masks": np.zeros((1, 9, 9), bool)}
    with pytest.raises(ValueError, match=name) as caught:
        draw_overlay(**(valid | arguments))
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    for part in parts:
        assert part in message


# --- anything at all ------------------------------------------------------------------------------


@st.composite
def any_call(draw: st.DrawFn) -> dict[str, Any]:
    height, width = draw(
        st.one_of(
            st.tuples(st.integers(1, 12), st.integers(1, 12)),
            st.tuples(st.integers(1, 90), st.integers(1, 90)),
            st.sampled_from([(1, 3000), (3000, 1), (3, 1500)]),
        )
    )
    count = draw(st.integers(0, 9))
    density = draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    noise = np.random.default_rng(draw(st.integers(0, 99))).random((count, height, width))
    anywhere = st.one_of(st.floats(-10, 100), st.floats(allow_nan=False, allow_infinity=False))
    points = draw(st.integers(0, 4))
    return {
        "image": grey_image(height, width),
        "masks": noise < density,
        "scores": draw(
            st.one_of(st.just([]), st.lists(st.floats(), min_size=count, max_size=count))
        ),
        "points": draw(hnp.arrays(np.float64, (points, 2), elements=anywhere)),
        "labels": draw(hnp.arrays(np.int64, points, elements=st.sampled_from([-1, 0, 1]))),
        "boxes": draw(
            hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.just(4)), elements=anywhere)
        ),
    }


@settings(max_examples=150, deadline=None)
@given(any_call())
def test_any_valid_call_draws_an_image_of_the_right_size(call: dict[str, Any]) -> None:
    before = call["masks"].copy()
    result = draw_overlay(**call)
    height, width = call["image"].shape[:2]
    assert (result.mode, result.size) == ("RGB", (width, height))
    assert (call["image"] == GREY).all()
    np.testing.assert_array_equal(call["masks"], before)
