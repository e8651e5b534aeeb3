"""Tests of `sam3rt.masks.postprocess`: against a slow plain version and against PyTorch."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from tests.support.helpers import MOBILE_IMAGE, MOBILE_MASKS, SAM3_IMAGE, SAM3_MASKS, examples
from tests.support.plain_predictor import components, slow_clean

from sam3rt.bundle import ImageSpec, MaskSpec
from sam3rt.geometry import ImageGeometry, geometry
from sam3rt.masks import MaskOptions, clean, finish, upsample
from sam3rt.masks.upsampling import direct, unpadded

Logits = NDArray[np.float32]

MODELS = {"sam3": (SAM3_IMAGE, SAM3_MASKS), "mobile_sam": (MOBILE_IMAGE, MOBILE_MASKS)}
OFF: dict[str, Any] = {"threshold": 0.0, "max_hole_area": 0.0, "max_sprinkle_area": 0.0}


# --- clean ----------------------------------------------------------------------------------------


@st.composite
def blobs(draw: st.DrawFn) -> Logits:
    """Patches of few levels, so that components of every size and values at the threshold occur."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    coarse = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    shape = (-(-height // coarse), -(-width // coarse))
    values = rng.choice(
        np.float32([-20, -1, 0, 0.5, 3, 40]), shape, p=[0.2, 0.2, 0.1, 0.1, 0.2, 0.2]
    )
    values = np.repeat(np.repeat(values, coarse, axis=0), coarse, axis=1)[:height, :width]
    speckle = rng.random((height, width)) < draw(st.sampled_from([0.0, 0.05, 0.3]))
    return np.where(speckle, -values, values)


areas = st.sampled_from([0.0, -1.0, 0.5, 1.0, 2.0, 3.5, 8.0, 40.0, 256.0, 1e6])


@given(
    logits=blobs(),
    threshold=st.sampled_from([0.0, 0.5, -1.0, 2.9, 0.1, -50.0, 50.0]),
    holes=areas,
    sprinkles=areas,
)
@examples(300)
def test_clean_equals_the_slow_version(
    logits: Logits, threshold: float, holes: float, sprinkles: float
) -> None:
    before = logits.copy()
    result = clean(logits, threshold, holes, sprinkles)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, slow_clean(logits, threshold, holes, sprinkles))
    np.testing.assert_array_equal(logits, before)


def test_slow_version_knows_diagonals_and_borders() -> None:
    wanted = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    assert sorted(map(len, components(wanted))) == [1, 1, 2]


def ring(size: int = 12, value: float = 5.0) -> Logits:
    """Foreground with a hole of one pixel at (3, 3) and one of 2 x 2 at (7, 7)."""
    logits = np.full((size, size), value, np.float32)
    logits[3, 3] = -1
    logits[7:9, 7:9] = -1
    return logits


def test_islands_are_found_before_holes_are_filled() -> None:
    """A ring of 8 pixels round a hole is 8 pixels, not the 9 it has once the hole is filled."""
    logits = np.full((9, 9), -5, np.float32)
    logits[3:6, 3:6] = 5
    logits[4, 4] = -5
    result = clean(logits, 0.0, 1, 8)
    expected = logits.copy()
    expected[3:6, 3:6] = -10
    expected[4, 4] = 10
    np.testing.assert_array_equal(result, expected)


def test_whole_background_counts_as_a_hole_like_any_other() -> None:
    """So it is in the reference: an empty mask smaller than the area becomes full."""
    assert (clean(np.full((4, 4), -3, np.float32), 0.0, 16, 0) == 10).all()
    assert (clean(np.full((4, 4), -3, np.float32), 0.0, 15, 0) == -3).all()


def test_unchanged_logits_are_not_copied() -> None:
    logits = ring()
    assert clean(logits, 0.0, 0.0, 0.0) is logits
    assert clean(logits, 0.0, 0.5, 0.5) is logits
    assert not np.shares_memory(clean(logits, 0.0, 4.0, 0.0), logits)


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: np.broadcast_to(a[3], a.shape),
    ],
    ids=["Fortran order", "strided", "negative strides", "broadcast"],
)
def test_clean_of_views(view: Any) -> None:
    logits = view(ring())
    before = logits.copy()
    logits.flags.writeable = False
    np.testing.assert_array_equal(clean(logits, 0.0, 4, 12), slow_clean(before, 0.0, 4, 12))


def spiral(size: int) -> NDArray[np.bool_]:
    """One winding line, one pixel wide, with a gap of one pixel between its turns."""
    wanted = np.zeros((size, size), bool)
    y, x, dy, dx = 0, 0, 0, 1
    wanted[0, 0] = True
    while True:
        far_y, far_x = y + 2 * dy, x + 2 * dx
        inside = 0 <= y + dy < size and 0 <= x + dx < size
        if not inside or (0 <= far_y < size and 0 <= far_x < size and wanted[far_y, far_x]):
            dy, dx = dx, -dy
            if wanted[y + dy, x + dx] or wanted[y + 2 * dy, x + 2 * dx]:
                return wanted
            continue
        y, x = y + dy, x + dx
        wanted[y, x] = True


SHAPES: dict[str, NDArray[np.bool_]] = {
    "spiral": spiral(61),
    "comb": np.tile([True, False], (60, 30)) | (np.arange(60) == 59)[:, None],
    "comb upside down": np.tile([True, False], (60, 30)) | (np.arange(60) == 0)[:, None],
    "checkerboard": np.indices((60, 61)).sum(axis=0) % 2 == 0,
    "diagonal": np.eye(60, dtype=bool),
    "other diagonal": np.eye(60, dtype=bool)[:, ::-1],
    "zigzag": np.abs(np.indices((60, 61))[1] % 20 - 10) == np.indices((60, 61))[0] % 11,
    "dots": np.indices((60, 61)).max(axis=0) % 2 * np.indices((60, 61)).min(axis=0) % 2 == 1,
    "one column": np.arange(60)[:, None] % 7 > 1,
    "one row": np.arange(60)[None] % 7 > 1,
}


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_components_of_hard_shapes(shape: str, turn: int) -> None:
    wanted = np.rot90(SHAPES[shape], turn)
    logits = np.where(wanted, np.float32(3), np.float32(-3))
    sizes = {len(component) for component in components(wanted)}
    sizes |= {len(component) for component in components(~wanted)}
    for area in sorted({size - 1 for size in sizes} | sizes):
        np.testing.assert_array_equal(
            clean(logits, 0.0, area, area), slow_clean(logits, 0.0, area, area)
        )


def test_clean_keeps_large_components_of_the_real_size() -> None:
    """288 x 288 with thousands of components: labels do not overflow."""
    rng = np.random.default_rng(3)
    logits = rng.normal(-1, 1, (288, 288)).astype(np.float32)
    result = clean(logits, 0.0, 256, 3)
    np.testing.assert_array_equal(result, slow_clean(logits, 0.0, 256, 3))
    assert (result != logits).any()


# --- upsample -------------------------------------------------------------------------------------


def torch_upsample(
    logits: Logits, place: ImageGeometry, image: ImageSpec, masks: MaskSpec
) -> NDArray[np.float32]:
    """What the reference does, float32 [H, W]."""
    import torch
    import torch.nn.functional as functional

    def resize(tensor: Any, size: tuple[int, int]) -> Any:
        return functional.interpolate(tensor, size, mode="bilinear", align_corners=False)

    tensor = torch.from_numpy(np.array(logits))[None, None]
    if masks.upsampling == "unpad":
        tensor = resize(tensor, image.size)
        tensor = tensor[..., : place.input_size[0], : place.input_size[1]]
    result: NDArray[np.float32] = resize(tensor, place.original_size)[0, 0].numpy()
    return result


def upsampled(
    logits: Logits,
    place: ImageGeometry,
    image: ImageSpec,
    masks: MaskSpec,
    threshold: float | None = None,
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """The result of `upsample`, every pixel of which it must have written."""
    out = np.full(place.original_size, 99, dtype)
    upsample(logits, place, image, masks, out, threshold)
    return out


def smooth_logits(height: int, width: int, seed: int = 0) -> Logits:
    """Logits of usual size with steps as in a mask, float32 [height, width]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    field = sum(np.sin(rng.uniform(3, 30) * (x * a + y * b)) for a, b in rng.normal(size=(4, 2)))
    return (10 * field + rng.normal(0, 1, (height, width))).astype(np.float32)


SIZES = [
    (480, 640),
    (1080, 1920),
    (288, 288),
    (144, 144),
    (144, 288),
    (288, 144),
    (72, 96),
    (96, 72),
    (512, 512),
    (100, 80),
    (7, 13),
    (1, 1),
    (1, 50),
    (50, 1),
    (1, 40_000),
    (40_000, 1),
    (3, 40_000),
    (40_000, 3),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_upsample_equals_torch(model: str, size: tuple[int, int]) -> None:
    image, masks = MODELS[model]
    place = geometry(image, size)
    logits = smooth_logits(*masks.low_res_size)
    before = logits.copy()
    result = upsampled(logits, place, image, masks)
    # Coordinates of either library are float32: up to 288, times slopes of up to 20 a pixel.
    np.testing.assert_allclose(
        result, torch_upsample(logits, place, image, masks), rtol=1e-4, atol=2e-3
    )
    np.testing.assert_array_equal(logits, before)


@given(
    source=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    padded=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    part=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    model=st.sampled_from(sorted(MODELS)),
)
@examples(150)
def test_upsample_of_any_size_equals_torch(
    source: tuple[int, int],
    size: tuple[int, int],
    padded: tuple[int, int],
    part: tuple[float, float],
    model: str,
) -> None:
    rules, masks = MODELS[model]
    image = ImageSpec(padded, rules.resize, rules.resize_dtype, rules.mean, rules.std)
    inside = (max(1, int(padded[0] * part[0])), max(1, int(padded[1] * part[1])))
    place = ImageGeometry(size, inside)
    logits = smooth_logits(*source, seed=source[0])
    np.testing.assert_allclose(
        upsampled(logits, place, image, masks),
        torch_upsample(logits, place, image, masks),
        rtol=1e-4,
        atol=1e-3,
    )


def test_shrinking_does_not_antialias() -> None:
    """By 3 the middle pixel of each three is taken; an average would be a third of it."""
    logits = np.zeros((9, 9), np.float32)
    logits[1::3, 1::3] = 9
    place = ImageGeometry((3, 3), (1008, 1008))
    assert (upsampled(logits, place, SAM3_IMAGE, SAM3_MASKS) == 9).all()


def test_unpad_ignores_the_padding() -> None:
    """What the decoder says of the padding may not reach into the image."""
    place = geometry(MOBILE_IMAGE, (300, 600))
    assert place.input_size == (512, 1024)
    logits = np.full((256, 256), 5, np.float32)
    logits[130:] = -1000
    np.testing.assert_allclose(upsampled(logits, place, MOBILE_IMAGE, MOBILE_MASKS), 5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(33, 44), (1, 1), (1, 9), (9, 1), (256, 256), (288, 288)])
@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.uint8])
def test_upsample_thresholds_on_the_way(
    model: str, size: tuple[int, int], dtype: DTypeLike
) -> None:
    image, masks = MODELS[model]
    place = geometry(image, size)
    logits = smooth_logits(*masks.low_res_size)
    expected = upsampled(logits, place, image, masks) > np.float32(1.5)
    result = upsampled(logits, place, image, masks, 1.5, dtype)
    np.testing.assert_array_equal(result, expected.astype(dtype))


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_upsample_writes_to_its_place_only(threshold: float | None) -> None:
    place = geometry(SAM3_IMAGE, (20, 30))
    stack = np.full((3, 20, 30), 99, np.float32)
    upsample(smooth_logits(288, 288), place, SAM3_IMAGE, SAM3_MASKS, stack[1], threshold)
    assert (stack[[0, 2]] == 99).all()
    assert not (stack[1] == 99).any()


@pytest.mark.parametrize("model", MODELS)
def test_upsample_of_read_only_and_strided_logits(model: str) -> None:
    image, masks = MODELS[model]
    place = geometry(image, (50, 70))
    logits = smooth_logits(*masks.low_res_size)
    expected = upsampled(logits, place, image, masks)
    views = [logits.copy(), np.asfortranarray(logits), logits[::-1].copy()[::-1]]
    views[0].flags.writeable = False
    for view in views:
        np.testing.assert_allclose(
            upsampled(view, place, image, masks), expected, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    "size", [(1080, 1920), (480, 640), (1, 1), (4320, 7680), (9000, 40), (40, 20_000)]
)
@pytest.mark.parametrize("unpad", [False, True], ids=["direct", "unpad"])
def test_no_product_is_given_to_several_threads(size: tuple[int, int], unpad: bool) -> None:
    """OpenBLAS would let them spin after it, which slows the next decoder call down by half."""
    source = (256, 256)
    resampling = (
        unpadded(source, (1024, 1024), (700, 1024), size) if unpad else direct(source, size)
    )
    for groups, other, length in (
        (resampling.rows, size[1], size[0]),
        (resampling.columns, len(resampling.used), size[1]),
    ):
        bounds = [group.outputs.start for group in groups] + [length]
        assert bounds[0] == 0
        assert [group.outputs.stop for group in groups] == bounds[1:]
        assert max(group.weights.size for group in groups) * other < 1 << 18


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1), (3, 65_536), (65_536, 3)])
@pytest.mark.parametrize("model", MODELS)
def test_thin_images_take_no_dense_matrices(model: str, size: tuple[int, int]) -> None:
    """A matrix [65,536, 1,024] alone has 537 MB."""
    image, masks = MODELS[model]
    logits = smooth_logits(*masks.low_res_size)
    out = np.empty(size, np.bool_)
    for cached in (direct, unpadded):
        cached.cache_clear()
    tracemalloc.start()
    try:
        upsample(logits, geometry(image, size), image, masks, out, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (170e6 if size[0] == 3 else 20e6)


def test_upsample_from_many_threads() -> None:
    """Interpolation weights are cached and shared."""
    logits = smooth_logits(288, 288)
    places = [geometry(SAM3_IMAGE, (40 + i % 7, 300 - i % 5)) for i in range(64)]
    expected = [upsampled(logits, place, SAM3_IMAGE, SAM3_MASKS) for place in places]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda p: upsampled(logits, p, SAM3_IMAGE, SAM3_MASKS), places)
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, wanted)


# --- finish ---------------------------------------------------------------------------------------


def finished(
    low_res: Logits,
    model: str = "sam3",
    size: tuple[int, int] = (60, 90),
    *,
    return_logits: bool = False,
    dtype: DTypeLike = np.float32,
    **options: Any,
) -> NDArray[Any]:
    image, masks = MODELS[model]
    place = geometry(image, size)
    arguments = MaskOptions(**(OFF | options), return_logits=return_logits, dtype=dtype)
    return finish(low_res, place, image, masks, arguments)


@pytest.fixture(scope="module")
def low_res() -> Logits:
    """Two objects of three masks each, none alike; smaller than usual, for the slow version."""
    return np.stack([smooth_logits(96, 96, seed) for seed in range(6)]).reshape(2, 3, 96, 96)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("threshold", [0.0, 1.5, -4.0])
def test_logits_equal_the_steps_in_order(model: str, threshold: float, low_res: Logits) -> None:
    image, masks = MODELS[model]
    place = geometry(image, (60, 90))
    before = low_res.copy()
    options = {"threshold": threshold, "max_hole_area": 50.0, "max_sprinkle_area": 20.0}
    result = finished(low_res, model, return_logits=True, **options)
    assert result.shape == (2, 3, 60, 90)
    assert result.dtype == np.float32
    for index in np.ndindex(2, 3):
        cleaned = slow_clean(low_res[index], threshold, 50, 20)
        assert (cleaned != low_res[index]).any()
        np.testing.assert_allclose(
            result[index], torch_upsample(cleaned, place, image, masks), rtol=1e-4, atol=2e-3
        )
    np.testing.assert_array_equal(low_res, before)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(60, 90), (1, 1), (1, 70), (70, 1), (96, 96), (200, 300)])
@pytest.mark.parametrize("threshold", [0.0, -4.0, 0.1])
def test_masks_are_logits_above_the_threshold(
    model: str, size: tuple[int, int], threshold: float, low_res: Logits
) -> None:
    options = {"threshold": threshold, "max_hole_area": 256.0, "max_sprinkle_area": 9.0}
    logits = finished(low_res, model, size, return_logits=True, **options)
    for dtype in (np.float32, np.bool_, np.uint8, "float32", "bool", "uint8"):
        masks = finished(low_res, model, size, dtype=dtype, **options)
        assert masks.dtype == np.dtype(dtype)
        assert masks.shape == (2, 3, *size)
        assert set(np.unique(masks)) <= {0, 1}
        np.testing.assert_array_equal(masks.astype(bool), logits > np.float32(threshold))


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.uint8])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.1, -3.3, 1e-30, 31.9])
def test_value_exactly_at_the_threshold_is_not_foreground(
    dtype: DTypeLike, threshold: float
) -> None:
    import torch

    at = np.float32(threshold)
    steps = [np.nextafter(at, np.float32(-99)), at, np.nextafter(at, np.float32(99))]
    low_res = np.repeat(np.array(steps, np.float32), 96)[None, :].repeat(288, axis=0)
    # At its own size nothing is interpolated.
    masks = finished(low_res[None, None], size=(288, 288), threshold=threshold, dtype=dtype)
    np.testing.assert_array_equal(masks[0, 0, 0, [10, 100, 200]], [0, 0, 1])
    np.testing.assert_array_equal(
        masks[0, 0].astype(bool), (torch.from_numpy(low_res) > threshold).numpy()
    )


def test_results_do_not_share_memory_with_the_logits(low_res: Logits) -> None:
    """At the low resolution's own size, nothing is left to do."""
    result = finished(low_res, size=(96, 96), return_logits=True)
    np.testing.assert_array_equal(result, low_res)
    assert not np.shares_memory(result, low_res)


@pytest.mark.parametrize(("objects", "count"), [(1, 1), (1, 3), (5, 1), (4, 3)])
def test_every_object_and_mask_has_its_place(objects: int, count: int) -> None:
    values = np.arange(objects * count, dtype=np.float32).reshape(objects, count)
    low_res = np.broadcast_to(values[..., None, None], (objects, count, 288, 288))
    result = finished(low_res, return_logits=True)
    np.testing.assert_array_equal(result[:, :, 30, 40], values)
    masks = finished(low_res, threshold=1.0, dtype=np.uint8)
    np.testing.assert_array_equal(masks[:, :, 30, 40], values > 1)
