"""Tests of `sam3rt.predictor`: its state, its arguments and the shapes of what it returns."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import DTypeLike, NDArray
from tests.support.helpers import label, noise, photo, wrapped

from sam3rt import (
    BackendError,
    EmbeddingError,
    ImageEmbedding,
    ImageError,
    InvalidInputError,
    PromptError,
    Prompts,
    SAM3InteractiveImagePredictor,
    Sam3rtError,
    SegmentationModel,
    StateError,
    StateWarning,
)
from sam3rt.masks import finish

CLICK: dict[str, Any] = {"point_coords": [[30, 25]], "point_labels": [1]}
BOXES = np.array([[5, 5, 40, 30], [20, 10, 60, 45], [1, 2, 69, 49]], np.float32)
SIZES = ((50, 70), (64, 40), (31, 33))

Prediction = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(scope="module")
def embedding(model: SegmentationModel) -> ImageEmbedding:
    """An image of 50 x 70 pixels, encoded."""
    return model.encode(noise(*SIZES[0]))


@pytest.fixture(scope="module")
def cat(default_model: SegmentationModel) -> ImageEmbedding:
    """The photograph of the cat, as MobileSAM sees it. Its masks have small holes."""
    return default_model.encode(photo("chelsea"))


@pytest.fixture(scope="module")
def batch(tiny_model: SegmentationModel) -> SAM3InteractiveImagePredictor:
    """A predictor with two images set."""
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image_batch((noise(*SIZES[0]), noise(*SIZES[1])))
    return predictor


@pytest.fixture
def predictor(model: SegmentationModel, embedding: ImageEmbedding) -> SAM3InteractiveImagePredictor:
    """A predictor with the 50 x 70 image set."""
    return holding(model, embedding)


def holding(
    model: SegmentationModel, embedding: ImageEmbedding, **options: Any
) -> SAM3InteractiveImagePredictor:
    predictor = SAM3InteractiveImagePredictor(model, **options)
    predictor.set_embedding(embedding)
    return predictor


def same(actual: Prediction, expected: Prediction) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- signatures -----------------------------------------------------------------------------------


def test_constructor_has_the_references_defaults() -> None:
    parameters = inspect.signature(SAM3InteractiveImagePredictor).parameters
    assert {name: p.default for name, p in parameters.items() if name != "sam_model"} == {
        "mask_threshold": 0.0,
        "max_hole_area": 256.0,
        "max_sprinkle_area": 0.0,
        "mask_dtype": np.float32,
    }
    assert list(parameters)[:4] == [
        "sam_model",
        "mask_threshold",
        "max_hole_area",
        "max_sprinkle_area",
    ]
    assert parameters["mask_dtype"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "256.0" in str(inspect.signature(SAM3InteractiveImagePredictor))


@pytest.mark.parametrize("suffix", ["", "_batch"])
def test_predict_has_the_references_arguments(suffix: str) -> None:
    method = getattr(SAM3InteractiveImagePredictor, f"predict{suffix}")
    parameters = inspect.signature(method).parameters
    prompts = ("point_coords", "point_labels", "box", "mask_input")
    assert {name: p.default for name, p in parameters.items()} == {
        "self": inspect.Parameter.empty,
        **dict.fromkeys((name + suffix for name in prompts), None),
        "multimask_output": True,
        "return_logits": False,
        "normalize_coords": True,
    }
    assert list(parameters)[1:5] == [name + suffix for name in prompts]


# --- constructor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "model", object(), SegmentationModel, 5])
def test_model_must_be_a_model(value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SAM3InteractiveImagePredictor(value)
    assert caught.value.argument == "sam_model"


@pytest.mark.parametrize("name", ["mask_threshold", "max_hole_area", "max_sprinkle_area"])
@pytest.mark.parametrize(
    "value",
    [None, "0", float("nan")],
)
def test_numbers_must_be_numbers(tiny_model: SegmentationModel, name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SAM3InteractiveImagePredictor(tiny_model, **{name: value})
    assert caught.value.argument == name


@pytest.mark.parametrize("value", [1, 0, -1.5, np.float32(0.25), np.int64(3), 256])
def test_numbers_of_any_kind_are_kept(tiny_model: SegmentationModel, value: Any) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model, value, value, value)
    numbers = (predictor.mask_threshold, predictor.max_hole_area, predictor.max_sprinkle_area)
    assert numbers == (value,) * 3
    assert all(type(number) is float for number in numbers)


@pytest.mark.parametrize(
    "value",
    [np.float64, "nonsense"],
)
def test_other_mask_types_are_refused(tiny_model: SegmentationModel, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SAM3InteractiveImagePredictor(tiny_model, mask_dtype=value)
    assert caught.value.argument == "mask_dtype"


def test_device_is_the_models(model: SegmentationModel) -> None:
    assert SAM3InteractiveImagePredictor(model).device == "cpu" == model.device


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["predict", "predict_batch", "get_image_embedding"])
def test_nothing_works_before_an_image_is_set(tiny_model: SegmentationModel, method: str) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    with pytest.raises(StateError, match="set_image") as caught:
        getattr(predictor, method)()
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, Sam3rtError)


def test_prompts_are_not_looked_at_before_an_image_is_set(tiny_model: SegmentationModel) -> None:
    with pytest.raises(StateError):
        SAM3InteractiveImagePredictor(tiny_model).predict(point_coords="nonsense")


@pytest.mark.parametrize("method", ["predict", "predict_batch", "get_image_embedding"])
def test_reset_forgets_the_image(predictor: SAM3InteractiveImagePredictor, method: str) -> None:
    predictor.predict(**CLICK)
    predictor.reset_predictor()
    with pytest.raises(StateError):
        getattr(predictor, method)()
    predictor.reset_predictor()


def test_predict_batch_needs_a_batch(
    predictor: SAM3InteractiveImagePredictor, model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    with pytest.raises(StateError, match="set_image_batch"):
        predictor.predict_batch()
    predictor.set_image_batch([noise(*SIZES[0])])
    predictor.predict_batch()
    predictor.set_embedding(embedding)
    with pytest.raises(StateError, match="set_image_batch"):
        predictor.predict_batch()


def test_set_image_replaces_the_image(model: SegmentationModel, embedding: ImageEmbedding) -> None:
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_image(PIL.Image.fromarray(noise(*SIZES[1])))
    other = predictor.predict(**CLICK)
    assert other[0].shape == (3, *SIZES[1])
    predictor.set_image(noise(*SIZES[0]))
    same(predictor.predict(**CLICK), holding(model, embedding).predict(**CLICK))


def test_batch_equals_single_images(model: SegmentationModel) -> None:
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    single = SAM3InteractiveImagePredictor(model)
    calls: list[dict[str, Any]] = [{**CLICK, "box": None}, {"box": BOXES[0]}, {}]
    expected, maps = [], []
    for image, call in zip(images, calls, strict=True):
        single.set_image(image)
        expected.append(single.predict(**call, multimask_output=False, return_logits=True))
        maps.append(single.get_image_embedding())
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_image_batch(images)
    results = predictor.predict_batch(
        [call.get("point_coords") for call in calls],
        [call.get("point_labels") for call in calls],
        (None, BOXES[0], None),
        multimask_output=False,
        return_logits=True,
    )
    assert all(isinstance(result, list) and len(result) == 3 for result in results)
    for index, size in enumerate(SIZES):
        assert results[0][index].shape == (1, *size)
        same(tuple(result[index] for result in results), expected[index])  # type: ignore[arg-type]
    np.testing.assert_array_equal(predictor.get_image_embedding(), np.concatenate(maps))
    # predict uses the last of them, and the batch stays set.
    same(predictor.predict(multimask_output=False, return_logits=True), expected[-1])
    assert [len(result) for result in predictor.predict_batch()] == [3, 3, 3]
    # What fails leaves the batch as it was.
    with pytest.raises(PromptError):
        predictor.predict_batch([[[1, 2]], None, None])
    with pytest.raises(ImageError):
        predictor.set_image(np.zeros((5, 5, 3)))  # type: ignore[arg-type]
    same(predictor.predict(multimask_output=False, return_logits=True), expected[-1])
    assert len(predictor.predict_batch()[0]) == 3


BAD_IMAGES: dict[str, Any] = {
    "None": None,
    "path": "photo.png",
    "float": np.zeros((5, 5, 3), np.float32),
    "grey": np.zeros((5, 5), np.uint8),
    "no pixels": np.zeros((0, 5, 3), np.uint8),
    "mode": PIL.Image.new("I", (3, 3)),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_leaves_the_old_one(predictor: SAM3InteractiveImagePredictor, name: str) -> None:
    before = predictor.predict(**CLICK, return_logits=True)
    with pytest.raises(ImageError) as caught:
        predictor.set_image(BAD_IMAGES[name])
    assert caught.value.argument == "image"
    with pytest.raises(ImageError) as caught:
        predictor.set_image_batch([noise(5, 5), BAD_IMAGES[name]])
    assert caught.value.argument == "image_list[1]"
    same(predictor.predict(**CLICK, return_logits=True), before)
    with pytest.raises(StateError):
        predictor.predict_batch()


@pytest.mark.parametrize(
    "value",
    [[], (), None, 5, "ab", {}, {0: noise(5, 5)}, noise(5, 5), noise(5, 5)[None], iter([]), set()],
    ids=lambda v: type(v).__name__,
)
def test_image_list_must_be_a_list_of_images(
    batch: SAM3InteractiveImagePredictor, value: Any
) -> None:
    before = batch.predict(**CLICK)
    with pytest.raises(ImageError) as caught:
        batch.set_image_batch(value)
    assert caught.value.argument == "image_list"
    same(batch.predict(**CLICK), before)
    assert len(batch.predict_batch()[0]) == 2


def test_embeddings_take_the_place_of_a_batch(model: SegmentationModel) -> None:
    images = [noise(*size, seed) for seed, size in enumerate([(50, 60), (80, 40), (50, 60)])]
    by_images = SAM3InteractiveImagePredictor(model)
    by_images.set_image_batch([images[0], images[1], images[0]])
    first, second = (model.encode(image) for image in images[:2])
    predictor = SAM3InteractiveImagePredictor(model)
    predictor.set_embedding_batch([first, ImageEmbedding.from_bytes(second.to_bytes()), first])
    asked = ([CLICK["point_coords"]] * 3, [CLICK["point_labels"]] * 3)
    for found, expected in zip(
        predictor.predict_batch(*asked), by_images.predict_batch(*asked), strict=True
    ):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    same(predictor.predict(**CLICK), by_images.predict(**CLICK))
    before = predictor.predict(**CLICK)
    for value, name in (([], "embeddings"), (first, "embeddings"), ([first, 1], "embeddings[1]")):
        with pytest.raises(InvalidInputError) as caught:
            predictor.set_embedding_batch(value)  # type: ignore[arg-type]
        assert caught.value.argument == name
    stranger = dataclasses.replace(first, fingerprint="0" * 64)
    with pytest.raises(EmbeddingError, match="made by the bundle 000"):
        predictor.set_embedding_batch([first, stranger])
    same(predictor.predict(**CLICK), before)


def test_bad_image_in_a_list_is_found_before_anything_is_encoded(
    tiny_model: SegmentationModel,
) -> None:
    def fail(_: Any) -> Any:
        raise AssertionError("encoded")

    predictor = SAM3InteractiveImagePredictor(wrapped(tiny_model, on_encode=fail))
    with pytest.raises(ImageError):
        predictor.set_image_batch([noise(5, 5), None])  # type: ignore[list-item]


def test_failing_encoder_leaves_the_old_image(
    model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    calls = []

    def fail_at_second(maps: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise BackendError("out of memory")
        return maps

    predictor = holding(wrapped(model, on_encode=fail_at_second), embedding)
    before = predictor.predict(**CLICK)
    with pytest.raises(BackendError):
        predictor.set_image_batch([noise(5, 5), noise(6, 6)])
    same(predictor.predict(**CLICK), before)
    with pytest.raises(StateError):
        predictor.predict_batch()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ({"point_coords": [[1, 2]]}, "point_labels"),
        ({"point_coords": [[float("nan"), 2]], "point_labels": [1]}, "point_coords"),
        ({"box": [3, 2, 1, 4]}, "box"),
        ({"mask_input": np.zeros((1, 5, 5))}, "mask_input"),
        ({"point_coords": [[1, 2]], "point_labels": [7]}, "point_labels"),
    ],
)
def test_bad_prompt_leaves_everything_as_it_was(
    predictor: SAM3InteractiveImagePredictor, call: dict[str, Any], argument: str
) -> None:
    before = predictor.predict(**CLICK, return_logits=True)
    with pytest.raises(PromptError) as caught:
        predictor.predict(**call)
    assert caught.value.argument == argument
    same(predictor.predict(**CLICK, return_logits=True), before)


def test_failing_decoder_leaves_everything_as_it_was(
    model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    failing = []

    def maybe_fail(_: Any) -> None:
        if failing:
            raise BackendError("out of memory")

    predictor = holding(wrapped(model, on_decode=maybe_fail), embedding)
    before = predictor.predict(**CLICK)
    failing.append(1)
    with pytest.raises(BackendError):
        predictor.predict(**CLICK)
    failing.clear()
    same(predictor.predict(**CLICK), before)


def test_predictors_of_one_model_do_not_disturb_each_other(
    model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    first = holding(model, embedding)
    before = first.predict(**CLICK)
    second = SAM3InteractiveImagePredictor(model, mask_threshold=3.0)
    second.set_image(noise(*SIZES[2]))
    second.predict(**CLICK)
    second.reset_predictor()
    same(first.predict(**CLICK), before)


# --- arguments of predict_batch -------------------------------------------------------------------

BATCH_ARGUMENTS = (
    "point_coords_batch",
    "point_labels_batch",
    "box_batch",
    "mask_input_batch",
)


@pytest.mark.parametrize("argument", BATCH_ARGUMENTS)
@pytest.mark.parametrize(
    "value",
    [
        [],
        [None],
        [None] * 3,
        (None,),
        5,
        "ab",
        {},
        {0: None, 1: None},
        iter([None, None]),
        {None},
        np.zeros((3, 1, 2)),
        np.array(5),
    ],
    ids=label,
)
def test_batch_arguments_must_be_lists_of_the_right_length(
    batch: SAM3InteractiveImagePredictor, argument: str, value: Any
) -> None:
    with pytest.raises(PromptError) as caught:
        batch.predict_batch(**{argument: value})
    assert caught.value.argument == argument


def test_batch_arguments_may_be_arrays(batch: SAM3InteractiveImagePredictor) -> None:
    expected = batch.predict_batch(box_batch=[BOXES[0], BOXES[1]])
    for boxes in (BOXES[:2], tuple(BOXES[:2]), BOXES[:2].tolist()):
        for actual, wanted in zip(batch.predict_batch(box_batch=boxes), expected, strict=True):
            for a, b in zip(actual, wanted, strict=True):
                np.testing.assert_array_equal(a, b)


def test_batch_with_several_objects_per_image(batch: SAM3InteractiveImagePredictor) -> None:
    masks, scores, low_res = batch.predict_batch(box_batch=[BOXES, BOXES[0]])
    assert [m.shape for m in masks] == [(3, 3, *SIZES[0]), (3, *SIZES[1])]
    assert [s.shape for s in scores] == [(3, 3), (3,)]
    assert [m.shape for m in low_res] == [(3, 3, 16, 16), (3, 16, 16)]


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "objects"),
    [
        ({}, None),
        (CLICK, None),
        ({"point_coords": [[[30, 25]]], "point_labels": [[1]]}, None),
        ({"box": BOXES[0]}, None),
        ({"box": BOXES[:1]}, None),
        ({"box": BOXES}, 3),
        ({"point_coords": [[[30, 25]], [[1, 2]]], "point_labels": [[1], [0]]}, 2),
        ({**CLICK, "box": BOXES[0]}, None),
        ({"point_coords": np.zeros((0, 2)), "point_labels": []}, None),
    ],
)
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("return_logits", [True, False])
def test_shapes_and_types(
    predictor: SAM3InteractiveImagePredictor,
    call: dict[str, Any],
    objects: int | None,
    multimask: bool,
    return_logits: bool,
) -> None:
    masks, scores, low_res = predictor.predict(
        **call, multimask_output=multimask, return_logits=return_logits
    )
    lead = (() if objects is None else (objects,)) + ((3,) if multimask else (1,))
    size = predictor.model.manifest.masks.low_res_size
    assert masks.shape == (*lead, *SIZES[0])
    assert scores.shape == lead
    assert low_res.shape == (*lead, *size)
    assert masks.dtype == scores.dtype == low_res.dtype == np.float32
    assert (set(np.unique(masks)) <= {0, 1}) is not return_logits


def test_masks_alone_are_objects(predictor: SAM3InteractiveImagePredictor) -> None:
    _, _, low_res = predictor.predict(**CLICK)
    assert predictor.predict(mask_input=low_res[:1])[0].shape == (3, *SIZES[0])
    assert predictor.predict(mask_input=low_res[:1, None])[0].shape == (3, *SIZES[0])
    assert predictor.predict(mask_input=low_res[:2, None])[0].shape == (2, 3, *SIZES[0])


def test_low_res_masks_refine(predictor: SAM3InteractiveImagePredictor) -> None:
    _, scores, low_res = predictor.predict(**CLICK)
    best = int(scores.argmax())
    refined = predictor.predict(
        **CLICK, mask_input=low_res[best][None], multimask_output=False, return_logits=True
    )
    plain = predictor.predict(**CLICK, multimask_output=False, return_logits=True)
    assert not np.array_equal(refined[0], plain[0])


def test_objects_of_one_call_are_those_of_single_calls(
    predictor: SAM3InteractiveImagePredictor,
) -> None:
    together = predictor.predict(box=BOXES, return_logits=True)
    for index, box in enumerate(BOXES):
        alone = predictor.predict(box=box, return_logits=True)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[index], b, rtol=1e-3, atol=2e-3)


def test_normalized_coordinates(predictor: SAM3InteractiveImagePredictor) -> None:
    height, width = SIZES[0]
    pixels = predictor.predict([[35, 25], [7, 10]], [1, 0], box=[14, 5, 63, 45], return_logits=True)
    shares = predictor.predict(
        np.array([[35, 25], [7, 10]]) / [width, height],
        [1, 0],
        box=np.array([14, 5, 63, 45]) / [width, height, width, height],
        return_logits=True,
        normalize_coords=False,
    )
    for a, b in zip(pixels, shares, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [bool, np.uint8, "uint8", np.float32])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_masks_are_equal_in_every_type(
    model: SegmentationModel, embedding: ImageEmbedding, dtype: DTypeLike, share: float
) -> None:
    unfilled = holding(model, embedding, max_hole_area=0)
    logits, _, _ = unfilled.predict(box=BOXES, return_logits=True)
    options: Any = {"mask_threshold": float(np.quantile(logits, share)), "max_hole_area": 0}
    plain = holding(model, embedding, **options)
    typed = holding(model, embedding, **options, mask_dtype=dtype)
    expected, actual = plain.predict(box=BOXES), typed.predict(box=BOXES)
    assert actual[0].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(actual[0], expected[0].astype(dtype))
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[2], expected[2])
    assert typed.predict(box=BOXES, return_logits=True)[0].dtype == np.float32
    assert expected[0].any()
    assert not expected[0].all()


@pytest.mark.parametrize("value", [np.True_, 1, np.False_, 0])
def test_flags_may_be_any_truth_value(predictor: SAM3InteractiveImagePredictor, value: Any) -> None:
    count = 3 if value else 1
    masks, _, _ = predictor.predict(**CLICK, multimask_output=value, return_logits=value)
    assert masks.shape[0] == count
    np.testing.assert_array_equal(
        masks,
        predictor.predict(**CLICK, multimask_output=bool(value), return_logits=bool(value))[0],
    )


def test_results_belong_to_the_caller(predictor: SAM3InteractiveImagePredictor) -> None:
    first = predictor.predict(**CLICK)
    kept = [array.copy() for array in first]
    second = predictor.predict(box=BOXES[0])
    assert not np.array_equal(second[2], first[2])
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
    for array in first:
        array[...] = 7
    for array, copy in zip(predictor.predict(**CLICK), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_arguments_are_not_modified(predictor: SAM3InteractiveImagePredictor) -> None:
    size = predictor.model.manifest.masks.low_res_size
    arguments = {
        "point_coords": np.array([[30.0, 25.0]]),
        "point_labels": np.array([1]),
        "box": BOXES[0].copy(),
        "mask_input": np.ones((1, *size), np.float32),
    }
    copies = {name: array.copy() for name, array in arguments.items()}
    for array in arguments.values():
        array.flags.writeable = False
    predictor.predict(**arguments)  # type: ignore[arg-type]
    for name, array in arguments.items():
        np.testing.assert_array_equal(array, copies[name])


def test_results_do_not_depend_on_earlier_calls(predictor: SAM3InteractiveImagePredictor) -> None:
    """No memory of a mask prompt, a box or the number of objects."""
    before = predictor.predict(**CLICK, return_logits=True)
    predictor.predict(box=BOXES, mask_input=before[2][:1])
    predictor.predict()
    predictor.predict(mask_input=before[2][:1])
    same(predictor.predict(**CLICK, return_logits=True), before)


# --- low-resolution logits ------------------------------------------------------------------------


def louder(outputs: dict[str, NDArray[np.float32]]) -> None:
    """Logits far beyond 32 on either side."""
    for name, array in outputs.items():
        if "pred_masks" in name:
            array[...] = np.linspace(-100, 100, array.size).reshape(array.shape)


@pytest.mark.parametrize("multimask", [True, False])
def test_low_res_masks_are_clamped_for_sam3_alone(
    model: SegmentationModel, embedding: ImageEmbedding, multimask: bool
) -> None:
    loud = wrapped(model, on_decode=louder)
    predictor = holding(loud, embedding, max_hole_area=0)
    masks, _, low_res = predictor.predict(**CLICK, return_logits=True, multimask_output=multimask)
    own = loud.decode(embedding, Prompts(**CLICK), multimask).low_res_masks[0]
    assert own.min() < -40
    assert own.max() > 40
    if model.manifest.model_type == "sam3":
        assert (low_res.min(), low_res.max()) == (-32, 32)
        np.testing.assert_array_equal(low_res, np.clip(own, -32, 32))
    else:
        np.testing.assert_array_equal(low_res, own)
    # Masks come from the unclamped logits either way.
    assert masks.min() < -40
    assert masks.max() > 40


# --- holes and sprinkles --------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options with which the post-processing is called."""
    seen: list[dict[str, Any]] = []

    def spy(*arguments: Any) -> Any:
        seen.append(dataclasses.asdict(arguments[-1]))
        return finish(*arguments)

    monkeypatch.setattr("sam3rt.masks.finish", spy)
    return seen


def test_default_hole_area_is_the_models(
    model: SegmentationModel, embedding: ImageEmbedding, calls: list[dict[str, Any]]
) -> None:
    own = 256.0 if model.manifest.model_type == "sam3" else 0.0
    areas = {"unspecified": {}, "explicit": {"max_hole_area": 256.0}, "off": {"max_hole_area": 0}}
    for options in areas.values():
        holding(model, embedding, **options).predict(**CLICK)
    assert [call["max_hole_area"] for call in calls] == [own, 256.0, 0.0]
    positional = SAM3InteractiveImagePredictor(model, 0.0, 256.0, 0.0)
    assert positional.max_hole_area == 256.0


def test_options_reach_the_post_processing(
    tiny_model: SegmentationModel, calls: list[dict[str, Any]]
) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model, -0.5, 3, 7, mask_dtype=bool)
    predictor.set_image(noise(*SIZES[0]))
    predictor.predict(**CLICK)
    assert calls[0] == {
        "threshold": -0.5,
        "max_hole_area": 3.0,
        "max_sprinkle_area": 7.0,
        "return_logits": False,
        "dtype": np.dtype(bool),
    }


def test_mobile_sam_fills_holes_only_when_told(
    default_model: SegmentationModel, cat: ImageEmbedding
) -> None:
    unspecified = holding(default_model, cat).predict()
    explicit = holding(default_model, cat, max_hole_area=256.0).predict()
    off = holding(default_model, cat, max_hole_area=0.0).predict()
    same(unspecified, off)
    assert (explicit[0] >= off[0]).all()
    assert (explicit[0] - off[0]).sum() > 500
    # The returned low-resolution logits are the decoder's own.
    np.testing.assert_array_equal(explicit[2], off[2])


def test_sprinkles_are_removed_when_told(
    default_model: SegmentationModel, cat: ImageEmbedding
) -> None:
    plain = holding(default_model, cat).predict()
    removed = holding(default_model, cat, max_sprinkle_area=100.0).predict()
    assert (removed[0] <= plain[0]).all()
    assert (removed[0] < plain[0]).sum() > 20
    np.testing.assert_array_equal(removed[2], plain[2])


def test_threshold_applies_to_logits(model: SegmentationModel, embedding: ImageEmbedding) -> None:
    options = {"max_hole_area": 0.0}
    logits, _, _ = holding(model, embedding, **options).predict(**CLICK, return_logits=True)
    threshold = float(np.median(logits))
    masks, _, _ = holding(model, embedding, mask_threshold=threshold, **options).predict(**CLICK)
    np.testing.assert_array_equal(masks, logits > np.float32(threshold))


# --- embeddings -----------------------------------------------------------------------------------


def test_image_embedding_is_the_coarsest_map(
    predictor: SAM3InteractiveImagePredictor, embedding: ImageEmbedding
) -> None:
    array = predictor.get_image_embedding()
    assert array.shape == (1, *predictor.model.manifest.encoder.outputs[-1].shape[1:])
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, list(embedding.numpy().values())[-1])
    before = predictor.predict(**CLICK)
    array[...] = 0
    same(predictor.predict(**CLICK), before)


# --- threads --------------------------------------------------------------------------------------


def test_two_threads_at_once_are_refused_and_one_may_go_on(tiny_model: SegmentationModel) -> None:
    """Otherwise one caller's image answers the other's prompt."""
    entered, leave = threading.Event(), threading.Event()

    def wait(maps: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        entered.set()
        assert leave.wait(60)
        return maps

    predictor = SAM3InteractiveImagePredictor(wrapped(tiny_model, on_encode=wait))
    worker = threading.Thread(target=predictor.set_image, args=(noise(20, 30),))
    worker.start()
    assert entered.wait(60)
    calls = {
        "set_image": lambda: predictor.set_image(noise(9, 9)),
        "set_image_batch": lambda: predictor.set_image_batch([noise(9, 9)]),
        "predict": lambda: predictor.predict(**CLICK),
    }
    for call in calls.values():
        with pytest.raises(StateError, match="of its own"):
            call()
    leave.set()
    worker.join(60)
    assert predictor.predict(**CLICK)[0].shape[1:] == (20, 30)


def test_a_batch_cannot_be_exchanged_while_it_is_asked_about(
    tiny_model: SegmentationModel,
) -> None:
    """The other thread's batch would be met with this one's prompts."""
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image_batch([noise(40, 50)] * 2)
    said: list[BaseException | None] = []

    class Prying(list[Any]):
        def __len__(self) -> int:
            with ThreadPoolExecutor(1) as other:
                done = other.submit(predictor.set_image_batch, [noise(5, 5)] * 3)
                said.append(done.exception())
            return super().__len__()

    masks, _, _ = predictor.predict_batch(Prying([CLICK["point_coords"]] * 2), [[1]] * 2)
    assert [mask.shape[1:] for mask in masks] == [(40, 50)] * 2
    assert said
    assert all(isinstance(error, StateError) for error in said)


def test_taking_turns_with_another_threads_image_is_warned_of(
    tiny_model: SegmentationModel,
) -> None:
    """Nothing overlaps here, and still the other thread's image would answer in silence."""
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    predictor.set_image(noise(40, 50))
    with ThreadPoolExecutor(1) as other:
        # A thread that set no image may ask: workers of a pool share a predictor one by one.
        assert other.submit(predictor.predict, **CLICK).result()[0].shape[1:] == (40, 50)
        other.submit(predictor.set_image, noise(32, 36)).result()
        assert other.submit(predictor.predict, **CLICK).result()[0].shape[1:] == (32, 36)
    with pytest.warns(StateWarning, match="another thread set an image") as caught:
        predictor.predict(**CLICK)
    assert caught[0].filename == __file__
    predictor.set_image_batch([noise(40, 50)])
    predictor.predict_batch([CLICK["point_coords"]], [CLICK["point_labels"]])


def test_a_model_says_that_it_cannot_be_pickled_and_what_it_is(
    default_model: SegmentationModel,
) -> None:
    for what in (default_model, SAM3InteractiveImagePredictor(default_model)):
        with pytest.raises(StateError, match=r"load the model in each process: sam3rt\.load_model"):
            pickle.dumps(what)
    assert repr(default_model).startswith("<SegmentationModel mobile_sam, onnxruntime fp32 on cpu")
