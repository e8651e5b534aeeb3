"""The inputs exports are compared on."""

from __future__ import annotations

import numpy as np
import pytest

from sam3rt.accuracy.record import ParityCase
from sam3rt.bundle import ImageSpec, PromptSpec
from sam3rt_export.parity_inputs import cases_for, default_images

SAM3_IMAGE = ImageSpec((1008, 1008), "stretch", "float32", (127.5,) * 3, (127.5,) * 3)
SAM3_PROMPTS = PromptSpec("before_points", "always", (288, 288))
MOBILE_IMAGE = ImageSpec((1024, 1024), "longest_side", "uint8", (120.0,) * 3, (58.0,) * 3)
MOBILE_PROMPTS = PromptSpec("after_points", "without_box", (256, 256))


def by_name(image: ImageSpec, prompts: PromptSpec) -> dict[str, ParityCase]:
    return {case.name: case for case in cases_for(default_images(), image, prompts)}


def test_images_are_the_same_every_time_and_not_square() -> None:
    one, other = default_images(), default_images()
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in one)
    shapes = [image.shape[:2] for image in one]
    assert any(height < width for height, width in shapes)
    assert any(height > width for height, width in shapes)
    assert all(image.std() > 20 for image in one), "an image without contrast shows no mistakes"


@pytest.mark.parametrize(
    ("image", "prompts"), [(SAM3_IMAGE, SAM3_PROMPTS), (MOBILE_IMAGE, MOBILE_PROMPTS)]
)
def test_cases_reach_every_axis(image: ImageSpec, prompts: PromptSpec) -> None:
    cases = cases_for(default_images(), image, prompts)
    packed = [case.prompts for case in cases]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.image for case in cases} == {0, 1}
    assert {p.points.shape[0] for p in packed} == {1, 3}
    assert {p.points.shape[1] for p in packed} >= {0, 2, 4}
    assert {None if p.masks is None else len(p.masks) for p in packed} == {None, 1, 3}
    assert {int(label) for p in packed for label in p.labels.ravel()} == {-1, 0, 1, 2, 3}
    for p in packed:
        assert p.points.dtype == np.float32
        assert p.labels.dtype == np.int64
        assert p.masks is None or p.masks.shape[1:] == prompts.mask_size
        inside = p.points[p.labels >= 0]
        assert ((inside >= 0) & (inside <= image.size[0])).all()


def test_cases_follow_the_models_rules() -> None:
    models = (by_name(SAM3_IMAGE, SAM3_PROMPTS), by_name(MOBILE_IMAGE, MOBILE_PROMPTS))
    labels = {
        name: [cases[name].prompts.labels.tolist() for cases in models]
        for name in ("click_0", "box_0", "box_click_0", "nothing_0", "mask_only_0")
    }
    assert labels == {
        "click_0": [[[1, -1]], [[1, -1]]],
        "box_0": [[[2, 3, -1]], [[2, 3]]],
        "box_click_0": [[[2, 3, 1, -1]], [[1, 2, 3]]],
        "nothing_0": [[[]], [[]]],
        "mask_only_0": [[[]], [[]]],
    }
