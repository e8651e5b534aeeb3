"""Tests of `sam3rt.backends.tensorrt.runs`: classes of sizes, and several images in one run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples, noise, one_image_form
from tests.support.tensorrt_helpers import MAX_OBJECTS, Rig, make_rig

from sam3rt import Prompts, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.backends.tensorrt.backend import allow_imaging
from sam3rt.backends.tensorrt.imaging import Picture
from sam3rt.backends.tensorrt.memory import Block
from sam3rt.backends.tensorrt.runs import (
    Limits,
    Part,
    ShapeClass,
    classify,
    share_runs,
    usual_classes,
)
from sam3rt.geometry import ImageGeometry
from sam3rt.masks import MaskOptions
from sam3rt.prompts import PackedPrompts

SIZES = [(60, 90), (300, 451), (45, 8), (8, 8), (100, 100)]
LIMITS = Limits(16, 64)
MOST_MASKS = 300
BLOCK = cast(Block, object())
WHERE = ImageGeometry((8, 8), (8, 8))
OPTIONS = MaskOptions(max_hole_area=4, dtype=np.bool_)


limits = st.builds(Limits, st.integers(1, 70), st.integers(1, 130))


@given(limits, st.data())
@examples(200)
def test_a_class_holds_its_call_and_fits_the_engine(limit: Limits, data: st.DataObject) -> None:
    objects = data.draw(st.integers(1, limit.objects))
    points = data.draw(st.integers(0, limit.points))
    own = data.draw(st.booleans())
    found = classify(objects, points, own, limit)
    assert objects <= found.objects <= limit.objects
    assert points <= found.points <= limit.points
    assert found.masks == (found.objects if own else 1)
    # No more than four times what was asked for, beyond the least class.
    assert found.objects < 4 * objects
    assert found.points < max(4 * points, 5)


def test_there_are_few_classes() -> None:
    limit = Limits(16, 32)
    classes = {classify(o, p, False, limit) for o in range(1, 17) for p in range(33)}
    assert classes == set(usual_classes(limit))
    assert {c.objects for c in classes} == {1, 4, 16}
    assert {c.points for c in classes} == {4, 8, 32}
    assert classify(17, 33, False, Limits(70, 130)) == ShapeClass(64, 128, 1)
    assert usual_classes(Limits(1, 6)) == (ShapeClass(1, 4, 1), ShapeClass(1, 6, 1))
    assert classify(1, 0, False, Limits(16, 32)) == ShapeClass(1, 4, 1)
    assert classify(3, 5, True, Limits(16, 32)) == ShapeClass(4, 8, 4)
    assert classify(5, 5, False, Limits(6, 6)) == ShapeClass(6, 6, 1)


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    return rig


def runs(rig: Rig) -> int:
    return rig.cuda.count("enqueue") + rig.cuda.count("launch")


def check(model: SegmentationModel, asked: list[Prompts], options: MaskOptions) -> None:
    """Together and alone: the same."""
    embeddings = [model.encode(noise(*size, seed)) for seed, size in enumerate(SIZES)]
    alone = [
        model.segment_batch([e], [p], True, options)[0]
        for e, p in zip(embeddings, asked, strict=True)
    ]
    together = model.segment_batch(embeddings, asked, True, options)
    for (expected, masks), (decoded, found) in zip(alone, together, strict=True):
        np.testing.assert_allclose(decoded.low_res_masks, expected.low_res_masks, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            decoded.iou_predictions, expected.iou_predictions, rtol=0, atol=1e-5
        )
        assert found.shape == masks.shape
        assert found.dtype == masks.dtype
        if masks.dtype == np.bool_:
            assert (found != masks).mean() < 1e-3
        else:
            np.testing.assert_allclose(found, masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [OPTIONS, MaskOptions(return_logits=True)], ids=["", "logits"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_several_images_are_answered_as_each_alone(
    on_device: bool, options: MaskOptions, rig: Rig
) -> None:
    model = rig.model(lanes=1)
    if on_device:
        allow_imaging(model.backend)
        assert model.backend.imaging.postprocess_allowed
    boxes = [[1, 1, 7, 6], [2, 0, 5, 5], [0, 0, 7, 7]]
    asked = [
        Prompts([[4.0, 4.0]], [1]),
        Prompts(box=boxes),
        Prompts([[2.0, 4.0], [7.0, 7.0]], [1, 0]),
        Prompts(box=boxes * 2),  # more than one run takes
        Prompts([[4.0, 1.0]], [1]),
    ]
    for _ in range(2):  # recorded at the second run, and replayed
        check(model, asked, options)


def test_mask_prompts_stay_with_their_objects(rig: Rig) -> None:
    rng = np.random.default_rng(0)
    masks = rng.normal(0, 4, (5, 1, 16, 16)).astype(np.float32)
    check(
        rig.model(lanes=1),
        [
            Prompts([[4.0, 4.0]], [1], mask_input=None if i == 2 else mask)
            for i, mask in enumerate(masks)
        ],
        OPTIONS,
    )


def test_clicks_on_several_images_share_a_run(rig: Rig) -> None:
    model = rig.model(lanes=1)
    allow_imaging(model.backend)
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_image_batch([noise(*size) for size in SIZES])
    for _ in range(2):
        rig.cuda.log.clear()
        masks, _, _ = predictor.predict_batch([[[4.0, 4.0]]] * 5, [[1]] * 5)
        # The engine takes four objects.
        assert runs(rig) == 2
        assert [mask.shape[-2:] for mask in masks] == SIZES


def test_an_image_that_is_asked_about_twice(rig: Rig) -> None:
    model = rig.model(lanes=1)
    embedding = model.encode(noise(30, 20))
    clicks = [Prompts([[4.0 + i, 4.0]], [1]) for i in range(3)]
    rig.cuda.log.clear()
    together = model.segment_batch([embedding] * 3, clicks, True, OPTIONS)
    assert runs(rig) == 1
    for click, (decoded, _) in zip(clicks, together, strict=True):
        expected = model.decode(embedding, click)
        np.testing.assert_allclose(decoded.low_res_masks, expected.low_res_masks, rtol=0, atol=1e-4)


def test_engines_for_one_image_are_run_image_by_image(
    tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = one_image_form(tmp_path / "old", tiny_sam3)
    rig = make_rig(old.path, tmp_path / "rig", monkeypatch)
    rig.build()
    model = rig.model(lanes=1)
    assert not model.backend.joins_images
    check(model, [Prompts([[4.0, 4.0]], [1])] * 5, OPTIONS)


def test_an_image_with_large_masks_shares_a_run_with_small_ones(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rig.model(lanes=1)
    allow_imaging(model.backend)
    clicks = [Prompts([[4.0, 4.0]], [1])] * 5
    embeddings = [model.encode(noise(*size)) for size in SIZES]
    for most, expected in ((3 * 300 * 451 * 3 // 2, 2), (3 * 300 * 451, 3), (1, 5)):
        monkeypatch.setattr("sam3rt.backends.tensorrt.runs._MOST_MASKS", most)
        rig.cuda.log.clear()
        model.segment_batch(embeddings, clicks, True, OPTIONS)
        assert runs(rig) == expected


def test_where_memory_is_short_no_run_is_shared(rig: Rig) -> None:
    model = rig.model(lanes=1)
    asked = [Prompts([[4.0, 4.0]], [1])] * 3
    embeddings = [model.encode(noise(*size)) for size in SIZES[:3]]
    alone = [model.segment_batch([e], asked[:1])[0][0] for e in embeddings]
    rig.cuda.total = rig.cuda.used + 1000
    for _ in range(2):
        together = model.segment_batch(embeddings, asked)
        for expected, (found, _) in zip(alone, together, strict=True):
            np.testing.assert_array_equal(found.low_res_masks, expected.low_res_masks)


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 40), st.booleans(), st.integers(1, 20)),
        min_size=1,
    ),
    st.integers(1, MAX_OBJECTS),
    st.booleans(),
)
@examples(200)
def test_every_object_is_in_one_run_that_fits(
    calls: list[tuple[int, int, bool, int]], at_once: int, joins: bool
) -> None:
    images = [
        Part(
            BLOCK,
            PackedPrompts(
                np.full((objects, points, 2), image, np.float32),
                np.arange(objects, dtype=np.int64)[:, None] * np.ones((1, points), np.int64),
                np.zeros((1, 4, 4), np.float32) if has_mask else None,
            ),
            [np.full((1, objects, 2), image, np.float32)],
            Picture(WHERE, OPTIONS, np.full((objects, 1, side, side), image, np.uint8), False),
        )
        for image, (objects, points, has_mask, side) in enumerate(calls)
    ]
    seen = [0] * len(calls)
    limits = Limits(at_once, LIMITS.points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sam3rt.backends.tensorrt.runs._MOST_MASKS", MOST_MASKS)
        runs = list(share_runs(images, limits, joins=joins))
    for run in runs:
        assert sum(part.objects for part in run) <= at_once
        assert sum(part.mask_bytes for part in run) <= MOST_MASKS or len(run) == 1
        assert len({part.prompts.masks is None for part in run}) == 1
        sizes = {classify(1, part.prompts.labels.shape[1], False, limits).points for part in run}
        assert len(sizes) == 1
        assert joins or len({part.results[0].flat[0] for part in run}) == 1
        for part in run:
            image = int(part.results[0].flat[0])
            assert part.results[0].shape[1] == len(part.picture.masks) == part.objects
            assert (part.picture.masks == image).all()
            # In the order of each image's objects.
            if part.prompts.labels.shape[1]:
                assert part.prompts.labels[:, 0].tolist() == list(
                    range(seen[image], seen[image] + part.objects)
                )
            seen[image] += part.objects
    assert seen == [objects for objects, _, _, _ in calls]
