"""Tests of `sam3rt.backends.tensorrt.together`: objects of several images in one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples, noise, one_image_form
from tests.support.tensorrt_helpers import MAX_OBJECTS, Rig, make_rig

from sam3rt import Prompts, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.backends.tensorrt.offer import allow_imaging
from sam3rt.backends.tensorrt.shapes import Limits, classify
from sam3rt.backends.tensorrt.together import share_runs
from sam3rt.masks import MaskOptions
from sam3rt.prompts import PackedPrompts

SIZES = [(60, 90), (300, 451), (45, 8), (8, 8), (100, 100)]
LIMITS = Limits(16, 64)
OPTIONS = MaskOptions(max_hole_area=4, dtype=np.bool_)


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


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40), st.booleans()), min_size=1),
    st.integers(1, MAX_OBJECTS),
)
@examples(200)
def test_every_object_is_in_one_run_that_fits(
    calls: list[tuple[int, int, bool]], at_once: int
) -> None:
    prompts = [
        PackedPrompts(
            np.full((objects, points, 2), image, np.float32),
            np.arange(objects, dtype=np.int64)[:, None] * np.ones((1, points), np.int64),
            np.zeros((1, 4, 4), np.float32) if has_mask else None,
        )
        for image, (objects, points, has_mask) in enumerate(calls)
    ]
    seen = [0] * len(calls)
    for run in share_runs(prompts, at_once, LIMITS):
        assert sum(len(part.prompts.labels) for part in run) <= at_once
        assert len({part.prompts.masks is None for part in run}) == 1
        sizes = {classify(1, part.prompts.labels.shape[1], False, LIMITS).points for part in run}
        assert len(sizes) == 1
        for image, part in run:
            # In the order of each image's objects.
            if part.labels.shape[1]:
                assert part.labels[:, 0].tolist() == list(
                    range(seen[image], seen[image] + len(part.labels))
                )
            seen[image] += len(part.labels)
    assert seen == [objects for objects, _, _ in calls]
