"""The reference predictor's real outputs, reproduced through export and runtime.

See golden/sam3/README.md for what the data is. The limits are the project's promise; what is
reached is about ten times closer (README.md of the repository).
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import golden
from tests.support.golden import Prediction

from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.geometry import preprocess

FEATURE_LIMIT = 2e-3
LIMITS = {"logits": 5e-3, "iou": 1e-3, "mask_pixels": 2e-4}
# Where small holes are filled, a pixel at the threshold can move a component across the limit.
LIMITS_WITH_HOLES = {**LIMITS, "mask_pixels": 2e-3}

CASES = golden.sam_cases("sam3")


def check(name: str, prediction: Prediction) -> None:
    case = CASES[name]
    for array, part in zip(prediction, ("masks", "iou", "low_res"), strict=True):
        assert list(array.shape) == case["shapes"][part]
        assert array.dtype == np.float32
    if f"{name}/logits" not in golden.sam_outputs("sam3"):
        assert set(np.unique(prediction[0])) <= {0.0, 1.0}
    limits = LIMITS_WITH_HOLES if case["ctor"].get("max_hole_area", 256.0) > 0 else LIMITS
    errors = golden.sam_errors("sam3", name, prediction)
    assert all(errors[part] <= limit for part, limit in limits.items()), errors


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.get("batch")])
def test_predict(
    name: str, small_model: SegmentationModel, sam3_embeddings: dict[int, ImageEmbedding]
) -> None:
    check(name, golden.predict_sam_case("sam3", name, small_model, sam3_embeddings))


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_predict_batch(
    kind: str, small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    cases = [CASES[f"batch_{kind}_{index}"] for index in range(3)]
    predictor = SAM3InteractiveImagePredictor(small_model, **cases[0]["ctor"])
    predictor.set_image_batch([golden_images[index] for index in range(3)])
    results = predictor.predict_batch(**cases[0]["batch_args"])
    for index, case in enumerate(cases):
        check(case["id"], (results[0][index], results[1][index], results[2][index]))


@pytest.mark.parametrize("number", range(4))
def test_features(number: int, sam3_embeddings: dict[int, ImageEmbedding]) -> None:
    assert golden.sam_feature_error("sam3", number, sam3_embeddings[number]) <= FEATURE_LIMIT


def test_image_embedding_of_the_predictor(
    small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    predictor = SAM3InteractiveImagePredictor(small_model)
    predictor.set_image(golden_images[2])
    embedding = predictor.get_image_embedding()
    assert embedding.shape == (1, 256, 72, 72)
    expected = golden.sam_outputs("sam3")["image2/image_embed"]
    np.testing.assert_allclose(embedding[:, ::8, ::4, ::4], expected, atol=FEATURE_LIMIT, rtol=0)


def test_preprocessing(
    small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    pixels, _ = preprocess(small_model.manifest.image, golden_images[0])
    expected = golden.sam_outputs("sam3")["image0/preprocessed"]
    np.testing.assert_allclose(pixels[0, :, ::21, ::21], expected, atol=1e-4, rtol=0)
