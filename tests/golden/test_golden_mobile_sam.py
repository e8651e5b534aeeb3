"""The official MobileSAM predictor's real outputs on photographs, against the bundled model.

See golden/mobile_sam/README.md. The bundled weights are stored in FP16, hence limits wider than
those of the small SAM 3; the same graphs with FP32 weights agree to 1e-4 of the pixels.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import golden
from tests.support.helpers import photo

from sam3rt import ImageEmbedding, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.accuracy.metrics import largest_error
from sam3rt.geometry import preprocess

PHOTOS = golden.mobile_sam_document()["photos"]
MASK_IOU = 0.99
IOU_LIMIT = 2e-3
# Of logits up to 162 in size.
LOGIT_LIMIT = 0.2


@pytest.mark.parametrize("name", golden.mobile_sam_cases())
def test_predict(
    name: str, default_model: SegmentationModel, mobile_embeddings: dict[str, ImageEmbedding]
) -> None:
    case = golden.mobile_sam_cases()[name]
    predictor = SAM3InteractiveImagePredictor(default_model)
    predictor.set_embedding(mobile_embeddings[case["photo"]])
    prediction = predictor.predict(**golden.arguments_of(case))
    assert list(prediction[0].shape) == case["shapes"]["masks"]
    assert list(prediction[2].shape) == case["shapes"]["low_res"]
    errors = golden.mobile_sam_errors(name, prediction)
    assert errors["mask_ious"].min() >= MASK_IOU
    assert errors["iou"] <= IOU_LIMIT
    assert errors["logits"] <= LOGIT_LIMIT


@pytest.mark.parametrize("name", PHOTOS)
def test_preprocessing_and_embedding(
    name: str, default_model: SegmentationModel, mobile_embeddings: dict[str, ImageEmbedding]
) -> None:
    pixels, place = preprocess(default_model.manifest.image, photo(name))
    assert list(place.input_size) == PHOTOS[name]["input_size"]
    expected = golden.mobile_sam_outputs()
    assert largest_error(pixels[0, :, ::21, ::21], expected[f"{name}/preprocessed"]) <= 1e-5
    (embedding,) = mobile_embeddings[name].numpy().values()
    assert largest_error(embedding[0, ::8, ::4, ::4], expected[f"{name}/embedding"]) <= 2e-3


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
    mobile_embeddings: dict[str, ImageEmbedding],
) -> None:
    predictor = SAM3InteractiveImagePredictor(default_model)
    predictor.set_embedding(mobile_embeddings[name])
    _, scores, _ = predictor.predict(point_coords=np.array([click]), point_labels=np.array([1]))
    assert scores.max() == pytest.approx(iou, abs=1e-3)
