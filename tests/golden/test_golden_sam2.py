"""The real outputs of SAM 2's own predictor, reproduced through export and runtime.

See golden/sam2/README.md for what the data is. Limits are SAM 3's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.support import golden
from tests.support.golden import Prediction

import sam3rt
from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.accuracy.metrics import largest_error
from sam3rt.geometry import preprocess

FEATURE_LIMIT = 5e-4
LIMITS = {"logits": 1e-3, "iou": 1e-4, "mask_pixels": 2e-4}
# Where small holes are filled, a pixel at the threshold can move a component across the limit.
LIMITS_WITH_HOLES = {**LIMITS, "mask_pixels": 2e-3}

CASES = golden.sam_cases("sam2")
SINGLE = [name for name, case in CASES.items() if not case.get("batch")]


@pytest.fixture(scope="module")
def model(small_sam2: Path) -> SegmentationModel:
    """The small SAM 2.1 in ONNX Runtime, on the CPU."""
    return sam3rt.load_model(small_sam2, backend="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def embeddings(
    model: SegmentationModel, sam2_images: dict[int, NDArray[np.uint8]]
) -> dict[int, ImageEmbedding]:
    """One embedding per golden image; image 1 goes in as a PIL image, as in the reference."""
    return encode(model, sam2_images)


def encode(
    model: SegmentationModel, images: dict[int, NDArray[np.uint8]]
) -> dict[int, ImageEmbedding]:
    return {
        number: model.encode(PIL.Image.fromarray(image) if number == 1 else image)
        for number, image in images.items()
    }


def check(name: str, prediction: Prediction) -> None:
    case = CASES[name]
    for array, part in zip(prediction, ("masks", "iou", "low_res"), strict=True):
        assert list(array.shape) == case["shapes"][part]
        assert array.dtype == np.float32
    limits = LIMITS_WITH_HOLES if case["ctor"].get("max_hole_area") else LIMITS
    errors = golden.sam_errors("sam2", name, prediction)
    assert all(errors[part] <= limit for part, limit in limits.items()), errors


@pytest.mark.parametrize("name", SINGLE)
def test_predict(
    name: str, model: SegmentationModel, embeddings: dict[int, ImageEmbedding]
) -> None:
    check(name, golden.predict_sam_case("sam2", name, model, embeddings))


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_predict_batch(
    kind: str, model: SegmentationModel, sam2_images: dict[int, NDArray[np.uint8]]
) -> None:
    cases = [CASES[f"batch_{kind}_{index}"] for index in range(3)]
    predictor = SAM3InteractiveImagePredictor(model, **cases[0]["ctor"])
    predictor.set_image_batch([sam2_images[index] for index in range(3)])
    results = predictor.predict_batch(**cases[0]["batch_args"])
    for index, case in enumerate(cases):
        check(case["id"], (results[0][index], results[1][index], results[2][index]))


@pytest.mark.parametrize("number", range(4))
def test_features(number: int, embeddings: dict[int, ImageEmbedding]) -> None:
    assert golden.sam_feature_error("sam2", number, embeddings[number]) <= FEATURE_LIMIT


def test_preprocessing(model: SegmentationModel, sam2_images: dict[int, NDArray[np.uint8]]) -> None:
    pixels, _ = preprocess(model.manifest.image, sam2_images[0])
    expected = golden.sam_outputs("sam2")["image0/preprocessed"]
    np.testing.assert_allclose(pixels[0, :, ::21, ::21], expected, atol=1e-4, rtol=0)


def test_what_the_cases_reach() -> None:
    """Both ways to a single mask, and holes and sprinkles that change masks."""
    outputs = golden.sam_outputs("sam2")
    picked = {
        single: np.isclose(outputs[f"{single}/iou"], outputs[f"{multi}/iou"]).any()
        for single, multi in (("point_single", "point"), ("boxes", "boxes_multi"))
    }
    assert picked["point_single"], "no single mask is the best of three"
    alone = largest_error(outputs["boxes/iou"][0, 0], outputs["boxes_multi/iou"][0])
    assert alone > 1e-3, "no single mask is token 0's"
    assert CASES["holes"]["mask_area"] != CASES["point"]["mask_area"]


def test_in_openvino(small_sam2: Path, sam2_images: dict[int, NDArray[np.uint8]]) -> None:
    model = sam3rt.load_model(small_sam2, backend="openvino", precision="fp32")
    embeddings = encode(model, {n: image for n, image in sam2_images.items() if n < 3})
    for number, embedding in embeddings.items():
        assert golden.sam_feature_error("sam2", number, embedding) <= FEATURE_LIMIT
    for name in ("point", "boxes", "points_batch", "refine_single", "mask_only", "no_prompt"):
        check(name, golden.predict_sam_case("sam2", name, model, embeddings))
