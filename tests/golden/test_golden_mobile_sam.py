"""The official MobileSAM predictor's real outputs on photographs, against the bundled model.

See golden/mobile_sam/README.md. The bundled weights are stored in FP16, hence limits wider than
those of the small SAM 3; the same graphs with FP32 weights agree to 1e-4 of the pixels.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import GOLDEN, photo

from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.geometry import preprocess

FOLDER = GOLDEN / "mobile_sam"
EXPECTED = np.load(FOLDER / "golden.npz")
MASK_INPUTS = np.load(FOLDER / "mask_inputs.npz")
DOCUMENT = json.loads((FOLDER / "cases.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in DOCUMENT["cases"]}
MASK_IOU = 0.99
IOU_LIMIT = 2e-3
# Of logits up to 162 in size.
LOGIT_LIMIT = 0.2


@pytest.fixture(scope="module")
def embeddings(default_model: SegmentationModel) -> dict[str, ImageEmbedding]:
    return {name: default_model.encode(photo(name)) for name in DOCUMENT["photos"]}


def arguments_of(case: dict[str, Any]) -> dict[str, Any]:
    arguments = {k: v for k, v in case["args"].items() if v is not None}
    if "boxes" in arguments:
        arguments["box"] = arguments.pop("boxes")
    if "mask_input" in case:
        source = case["mask_input"]
        arguments["mask_input"] = MASK_INPUTS[f"{source['from_case']}/{source['channel']}"][None]
    return arguments


def mask_ious(masks: NDArray[Any], expected: NDArray[np.bool_]) -> NDArray[np.float64]:
    both = (masks & expected).sum(axis=(-2, -1))
    either = (masks | expected).sum(axis=(-2, -1))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_predict(
    name: str, default_model: SegmentationModel, embeddings: dict[str, ImageEmbedding]
) -> None:
    case = CASES[name]
    predictor = SAM3InteractiveImagePredictor(default_model)
    predictor.set_embedding(embeddings[case["photo"]])
    masks, iou, low_res = predictor.predict(**arguments_of(case))
    assert list(masks.shape) == case["shapes"]["masks"]
    assert list(low_res.shape) == case["shapes"]["low_res"]
    expected = np.unpackbits(EXPECTED[f"{name}/masks"], count=masks.size).reshape(masks.shape)
    assert mask_ious(masks > 0, expected.astype(bool)).min() >= MASK_IOU
    np.testing.assert_allclose(iou, EXPECTED[f"{name}/iou"], atol=IOU_LIMIT, rtol=0)
    np.testing.assert_allclose(
        low_res[..., ::3, ::3], EXPECTED[f"{name}/low_res"], atol=LOGIT_LIMIT, rtol=0
    )
    if case["args"].get("return_logits"):
        np.testing.assert_allclose(
            masks[..., ::7, ::7], EXPECTED[f"{name}/logits"], atol=LOGIT_LIMIT, rtol=0
        )


@pytest.mark.parametrize("name", DOCUMENT["photos"])
def test_preprocessing_and_embedding(
    name: str, default_model: SegmentationModel, embeddings: dict[str, ImageEmbedding]
) -> None:
    pixels, place = preprocess(default_model.manifest.image, photo(name))
    assert list(place.input_size) == DOCUMENT["photos"][name]["input_size"]
    np.testing.assert_allclose(
        pixels[0, :, ::21, ::21], EXPECTED[f"{name}/preprocessed"], atol=1e-5, rtol=0
    )
    (embedding,) = embeddings[name].numpy().values()
    np.testing.assert_allclose(
        embedding[0, ::8, ::4, ::4], EXPECTED[f"{name}/embedding"], atol=2e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "click", "iou"),
    [
        ("chelsea", (225, 150), 0.994),
        ("coffee", (300, 180), 0.994),
        ("astronaut", (220, 120), 0.990),
    ],
)
def test_published_scores(
    name: str,
    click: tuple[int, int],
    iou: float,
    default_model: SegmentationModel,
    embeddings: dict[str, ImageEmbedding],
) -> None:
    predictor = SAM3InteractiveImagePredictor(default_model)
    predictor.set_embedding(embeddings[name])
    _, scores, _ = predictor.predict(point_coords=np.array([click]), point_labels=np.array([1]))
    assert scores.max() == pytest.approx(iou, abs=1e-3)
