"""The reference predictor's real outputs, reproduced through export and runtime.

See golden/sam3/README.md for what the data is. The limits are the project's promise; what is
reached is about ten times closer (README.md of the repository).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from tests.golden.sam3 import synthetic

from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.geometry import preprocess

FEATURE_LIMIT = 2e-3
LOGIT_LIMIT = 5e-3
IOU_LIMIT = 1e-3
PIXEL_LIMIT = 2e-4
# Where small holes are filled, a pixel at the threshold can move a component across the limit.
PIXEL_LIMIT_WITH_HOLES = 2e-3

GOLDEN = np.load(synthetic.FOLDER / "golden.npz")
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in synthetic.cases()["cases"]}


@pytest.fixture(scope="module")
def embeddings(
    small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> dict[int, ImageEmbedding]:
    """One embedding per golden image; image 1 goes in as a PIL image, as in the reference."""
    return {
        number: small_model.encode(PIL.Image.fromarray(image) if number == 1 else image)
        for number, image in golden_images.items()
    }


def predict_case(
    case_id: str, model: SegmentationModel, embeddings: dict[int, ImageEmbedding]
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    case = CASES[case_id]
    predictor = SAM3InteractiveImagePredictor(model, **case["ctor"])
    predictor.set_embedding(embeddings[case["image"]])
    arguments = dict(case["args"])
    if "mask_input" in case:
        source = case["mask_input"]
        low_res = predict_case(source["from_case"], model, embeddings)[2]
        arguments["mask_input"] = low_res[source["channel"]][None]
    return predictor.predict(**arguments)


def check(
    case: dict[str, Any],
    masks: NDArray[Any],
    iou: NDArray[np.float32],
    low_res: NDArray[np.float32],
) -> None:
    name = case["id"]
    assert list(masks.shape) == case["shapes"]["masks"]
    assert list(iou.shape) == case["shapes"]["iou"]
    assert list(low_res.shape) == case["shapes"]["low_res"]
    assert masks.dtype == iou.dtype == low_res.dtype == np.float32
    if f"{name}/logits" in GOLDEN:
        np.testing.assert_allclose(
            masks[..., ::7, ::7], GOLDEN[f"{name}/logits"], atol=LOGIT_LIMIT, rtol=0
        )
    else:
        assert set(np.unique(masks)) <= {0.0, 1.0}
    np.testing.assert_allclose(
        low_res[..., ::3, ::3], GOLDEN[f"{name}/low_res"], atol=LOGIT_LIMIT, rtol=0
    )
    np.testing.assert_allclose(iou, GOLDEN[f"{name}/iou"], atol=IOU_LIMIT, rtol=0)
    expected = np.unpackbits(GOLDEN[f"{name}/masks"], count=masks.size).reshape(masks.shape)
    differing = ((masks > 0) != expected.astype(bool)).mean(axis=(-2, -1))
    fills = case["ctor"].get("max_hole_area", 256.0) > 0
    assert differing.max() <= (PIXEL_LIMIT_WITH_HOLES if fills else PIXEL_LIMIT)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.get("batch")])
def test_predict(
    name: str, small_model: SegmentationModel, embeddings: dict[int, ImageEmbedding]
) -> None:
    check(CASES[name], *predict_case(name, small_model, embeddings))


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_predict_batch(
    kind: str, small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    cases = [CASES[f"batch_{kind}_{index}"] for index in range(3)]
    predictor = SAM3InteractiveImagePredictor(small_model, **cases[0]["ctor"])
    predictor.set_image_batch([golden_images[index] for index in range(3)])
    results = predictor.predict_batch(**cases[0]["batch_args"])
    for index, case in enumerate(cases):
        check(case, *(part[index] for part in results))


@pytest.mark.parametrize("number", range(4))
def test_features(number: int, embeddings: dict[int, ImageEmbedding]) -> None:
    fine, middle, coarse = embeddings[number].numpy().values()
    for actual, name in (
        (coarse[0, ::8, ::4, ::4], "image_embed"),
        (fine[0, ::8, ::16, ::16], "high_res_0"),
        (middle[0, ::8, ::8, ::8], "high_res_1"),
    ):
        expected = GOLDEN[f"image{number}/{name}"][0]
        np.testing.assert_allclose(actual, expected, atol=FEATURE_LIMIT, rtol=0)
    stats = [[a.mean(), a.std(), np.abs(a).max()] for a in (fine, middle, coarse)]
    np.testing.assert_allclose(
        np.ravel(stats), GOLDEN[f"image{number}/stats"].ravel(), atol=FEATURE_LIMIT, rtol=0
    )


def test_image_embedding_of_the_predictor(
    small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    predictor = SAM3InteractiveImagePredictor(small_model)
    predictor.set_image(golden_images[2])
    embedding = predictor.get_image_embedding()
    assert embedding.shape == (1, 256, 72, 72)
    expected = GOLDEN["image2/image_embed"]
    np.testing.assert_allclose(embedding[:, ::8, ::4, ::4], expected, atol=FEATURE_LIMIT, rtol=0)


def test_preprocessing(
    small_model: SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> None:
    pixels, _ = preprocess(small_model.manifest.image, golden_images[0])
    expected = GOLDEN["image0/preprocessed"]
    np.testing.assert_allclose(pixels[0, :, ::21, ::21], expected, atol=1e-4, rtol=0)
