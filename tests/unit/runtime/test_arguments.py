"""Wrong arguments of the public calls: each is named, whatever else numpy or pathlib would say."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.helpers import label

from sam3rt import (
    BundleError,
    EmbeddingError,
    ImageError,
    InvalidInputError,
    PromptError,
    Prompts,
    SAM3InteractiveImagePredictor,
    Segmentation,
    SegmentationModel,
)
from sam3rt.masks import MaskOptions
from sam3rt_serve.client import ServerError

IMAGE = np.zeros((20, 30, 3), np.uint8)
CLICK: dict[str, Any] = {"point_coords": [[5, 5]], "point_labels": [1]}
NO_NUMBERS = [
    *("1", None, True, np.True_, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400),
    # float() of the last takes only its real part.
    *([1.0], np.array([1.0]), 1j, np.complex64(1)),
]
NO_FLAGS = ["no", None, 2, math.nan, [], [True], np.array([True, False])]


class Unnamed:
    """A path as bytes."""

    def __fspath__(self) -> bytes:
        return b"picture.png"


@pytest.fixture(scope="module")
def result(tiny_model: SegmentationModel) -> Segmentation:
    return tiny_model.segment_image(IMAGE, points=[5, 5])


@pytest.mark.parametrize("value", NO_FLAGS, ids=label)
@pytest.mark.parametrize("name", ["multimask_output", "return_logits", "normalize_coords"])
def test_flags_of_predict(name: str, value: Any, tiny_model: SegmentationModel) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(IMAGE)
    with pytest.raises(InvalidInputError, match=f"^{name}: got .*, expected True or False"):
        predictor.predict(**CLICK, **{name: value})
    predictor.set_image_batch([IMAGE])
    with pytest.raises(InvalidInputError, match=f"^{name}: "):
        predictor.predict_batch([CLICK["point_coords"]], [[1]], **{name: value})


@pytest.mark.parametrize("value", NO_FLAGS, ids=label)
def test_flags_of_the_model(value: Any, tiny_model: SegmentationModel) -> None:
    embedding = tiny_model.encode(IMAGE)
    with pytest.raises(InvalidInputError, match=r"^multimask_output: "):
        tiny_model.decode(embedding, Prompts(**CLICK), value)
    with pytest.raises(InvalidInputError, match=r"^multimask_output: "):
        tiny_model.segment_batch([embedding], [Prompts(**CLICK)], value)
    with pytest.raises(InvalidInputError, match=r"^return_logits: "):
        tiny_model.segment(embedding, Prompts(**CLICK), return_logits=value)
    with pytest.raises(InvalidInputError, match=r"^normalize_coords: "):
        tiny_model.decode(embedding, Prompts(**CLICK, normalize_coords=value))
    for name in ("multimask_output", "bgr"):
        with pytest.raises(InvalidInputError, match=f"^{name}: "):
            tiny_model.segment_image(IMAGE, points=[5, 5], **{name: value})


def test_what_is_no_embedding_and_no_prompts(tiny_model: SegmentationModel) -> None:
    embedding = tiny_model.encode(IMAGE)
    for call in (tiny_model.decode, tiny_model.segment):
        with pytest.raises(InvalidInputError, match=r"^prompts: got dict, expected .*Prompts"):
            call(embedding, CLICK)  # type: ignore[arg-type]
    for call in (tiny_model.decode, tiny_model.segment):
        with pytest.raises(InvalidInputError, match=r"^embedding: got ndarray, expected an Image"):
            call(IMAGE, Prompts(**CLICK))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=label)
@pytest.mark.parametrize("name", ["threshold", "max_hole_area", "max_sprinkle_area"])
def test_numbers_of_masks(name: str, value: Any, tiny_model: SegmentationModel) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: got "):
        MaskOptions(**{name: value})
    if (name, value) == ("max_hole_area", None):  # the model's own
        return
    with pytest.raises(InvalidInputError, match=f"^{name}: got "):
        tiny_model.segment_image(IMAGE, points=[5, 5], **{name: value})


def test_a_predictors_setting_that_was_changed_is_checked(tiny_model: SegmentationModel) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(IMAGE)
    predictor.mask_threshold = math.nan
    with pytest.raises(InvalidInputError, match=r"^mask_threshold: got nan"):
        predictor.predict(**CLICK)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "nothing",
            object,
            object(),
            "float64",
            np.float16,
            np.int8,
            np.int32,
            ">f4",
            None,
            5,
            str,
        ),
        *([("a", "f4")], {}, {"names": ["a"], "formats": []}),
    ],
    ids=label,
)
def test_the_type_of_masks(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^dtype: got "):
        MaskOptions(dtype=value)


@pytest.mark.parametrize("value", ["x", -1, math.nan, math.inf, None], ids=label)
def test_the_tolerance_of_polygons(value: Any, result: Segmentation) -> None:
    with pytest.raises(InvalidInputError, match=r"^tolerance: got "):
        result.polygons(tolerance=value)


@pytest.mark.parametrize("value", [b"a.png", None, 3, "", Path(), "a\0.png", Unnamed()], ids=label)
def test_paths(value: Any, result: Segmentation, tiny_model: SegmentationModel) -> None:
    embedding = tiny_model.encode(IMAGE)
    for call in (result.save, embedding.save, tiny_model.load_embedding):
        with pytest.raises(InvalidInputError, match=r"^path: got .*, expected .*path"):
            call(value)


def test_a_folder_is_no_embedding_and_a_path_of_bytes_no_crash(
    tmp_path: Path, tiny_model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EmbeddingError, match="is a folder"):
        tiny_model.load_embedding(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=r"picture\.png"):
        tiny_model.segment_image(Unnamed())


def test_a_wrong_prompt_of_several_images_says_which(tiny_model: SegmentationModel) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image_batch([IMAGE, IMAGE])
    embeddings = [tiny_model.encode(IMAGE)] * 2
    wrong = [[[5, 5]], [[1, 2, 3]]]
    with pytest.raises(PromptError, match=r"^point_coords_batch\[1\]: got shape") as caught:
        predictor.predict_batch(wrong, [[1], [1]])
    assert caught.value.argument == "point_coords_batch[1]"
    with pytest.raises(PromptError, match=r"^prompts\[1\]\.point_coords: got shape"):
        tiny_model.segment_batch(embeddings, [Prompts(coords, [1]) for coords in wrong])
    with pytest.raises(PromptError, match=r"^point_coords: got shape"):
        predictor.predict(wrong[1], [1])
    predictor.set_image_batch([IMAGE])
    with pytest.raises(PromptError, match=r"^box_batch\[0\]: got shape"):
        predictor.predict_batch(box_batch=[[1, 2, 3]])


def test_lists_of_images_and_embeddings(tiny_model: SegmentationModel) -> None:
    embedding, prompts = tiny_model.encode(IMAGE), Prompts(**CLICK)
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("images", tiny_model.encode_batch, (None,)),
        ("images", tiny_model.encode_batch, (IMAGE,)),
        ("embeddings", tiny_model.segment_batch, (embedding, [prompts])),
        ("embeddings", tiny_model.segment_batch, (iter([embedding]), [prompts])),
        ("prompts", tiny_model.segment_batch, ([embedding], prompts)),
        ("options", tiny_model.segment_batch, ([embedding], [prompts], True, 0)),
    ]
    for argument, call, given in calls:
        with pytest.raises(InvalidInputError, match=f"^{argument}: got ") as caught:
            call(*given)
        assert caught.value.argument == argument


def test_errors_cross_processes(tiny_model: SegmentationModel) -> None:
    """A pool of processes that cannot unpickle what a task raised hangs, or breaks."""
    with pytest.raises(InvalidInputError) as caught:
        tiny_model.segment_image(IMAGE, [1, 2, 3])
    for error in [
        caught.value,
        BundleError("is cut", "a.onnx"),
        ServerError(429, "BusyError", "busy"),
    ]:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)
