"""Tests of `segment_image` and of what its results can do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco
from pycocotools.coco import COCO
from tests.conftest import PHOTOS
from tests.support.helpers import edit_manifest, noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt import (
    ImageEmbedding,
    ImageError,
    InvalidInputError,
    PromptError,
    SAM3InteractiveImagePredictor,
    Segmentation,
    SegmentationModel,
    StateError,
)
from sam3rt.cli.worker import joined
from sam3rt.masks.rle import runs_of
from sam3rt.overlay import draw_overlay

CHELSEA = PHOTOS / "chelsea.png"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SegmentationModel:
    """A model of a few nodes that says IoUs."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    runnable_bundle(folder)
    edit_manifest(folder, lambda document: document.update(model_type="mobile_sam"))
    return sam3rt.load_model(folder, backend="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def embedding(default_model: SegmentationModel) -> ImageEmbedding:
    """The cat's."""
    with PIL.Image.open(CHELSEA) as image:
        return default_model.encode(image)


@pytest.fixture(scope="module")
def cat(
    default_model: SegmentationModel, embedding: ImageEmbedding, chelsea: NDArray[np.uint8]
) -> Segmentation:
    """The cat, with its image."""
    return replace(default_model.segment_image(embedding, [225, 150]), image=chelsea)


def hand_made(*masks: Any, objects: Any = None, unit: Any = "iou") -> Segmentation:
    """A result of these masks, with the scores 0.9, 0.8 and so on."""
    array = np.stack(masks).astype(bool)
    scores = np.float32(0.9) - np.float32(0.1) * np.arange(len(array), dtype=np.float32)
    numbers = np.arange(len(array)) if objects is None else np.array(objects)
    return Segmentation(array, array.shape[1:], scores, numbers, unit)  # type: ignore[arg-type]


# --- the call -------------------------------------------------------------------------------------


def test_results_are_the_predictor_s_best_first(
    default_model: SegmentationModel, embedding: ImageEmbedding, cat: Segmentation
) -> None:
    predictor = SAM3InteractiveImagePredictor(default_model, mask_dtype=bool)
    predictor.set_embedding(embedding)
    masks, scores, low_res = predictor.predict([[225, 150]], [1])
    order = np.argsort(-scores)
    np.testing.assert_array_equal(cat.masks, masks[order])
    np.testing.assert_array_equal(cat.scores, scores[order])
    np.testing.assert_array_equal(cat.low_res_masks, low_res[order])
    assert cat.masks.dtype == bool
    assert cat.objects.tolist() == [0, 0, 0]
    refined, _, _ = predictor.predict(
        box=[20, 10, 400, 290], mask_input=low_res[order[:1]], multimask_output=False
    )
    again = default_model.segment_image(
        embedding, boxes=[20, 10, 400, 290], mask_input=cat.mask_input, multimask_output=False
    )
    np.testing.assert_array_equal(again.masks, refined)


def test_any_form_of_an_image_and_of_points_will_do(
    small: SegmentationModel, tmp_path: Path
) -> None:
    rgb = noise(30, 40)
    PIL.Image.fromarray(rgb).save(tmp_path / "photo.png")
    expected = small.segment_image(rgb, np.array([[5, 6]]), np.array([1]))
    for image, options in (
        (tmp_path / "photo.png", {}),
        (str(tmp_path / "photo.png"), {}),
        (PIL.Image.fromarray(rgb), {}),
        (rgb[..., ::-1], {"bgr": True}),
        (small.encode(rgb), {}),
    ):
        for points, labels in (
            ([5, 6], None),
            ((5, 6), 1),
            ([[5, 6]], [1]),
            ([[[5, 6]]], None),
            (np.array([5, 6]), np.array([1])),
        ):
            found = small.segment_image(image, points, labels, **options)
            np.testing.assert_array_equal(found.masks, expected.masks)
            assert (found.image is None) == isinstance(image, ImageEmbedding)
    assert small.segment_image(rgb, [5, 6], 0).prompts[0].labels.tolist() == [0]


def test_a_wrong_prompt_is_found_before_the_image_is_encoded(
    small: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "encode", None)
    with pytest.raises(PromptError, match="box"):
        small.segment_image(noise(30, 40), boxes=[1, 2, 3])


def test_files_are_read_upright(small: SegmentationModel, tmp_path: Path) -> None:
    rgb = noise(30, 40)
    picture = PIL.Image.fromarray(np.rot90(rgb))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    found = small.segment_image(tmp_path / "turned.png", [5, 6])
    np.testing.assert_array_equal(found.image, rgb)


def test_objects_may_have_different_numbers_of_points(small: SegmentationModel) -> None:
    rgb = noise(30, 40)
    together = small.segment_image(rgb, [[[5, 6], [9, 9]], [[20, 7]]], multimask_output=False)
    assert together.objects.tolist() == [0, 1]
    assert [p.points.tolist() for p in together.prompts] == [[[5, 6], [9, 9]], [[20, 7]]]
    for number, points in enumerate(([[5, 6], [9, 9]], [[20, 7]])):
        alone = small.segment_image(rgb, points, multimask_output=False)
        np.testing.assert_array_equal(together[number].masks, alone.masks)
    boxes = small.segment_image(rgb, boxes=[[1, 2, 9, 9], [3, 3, 30, 20]])
    assert boxes.objects.tolist() == [0, 0, 0, 1, 1, 1]
    assert [p.box.tolist() for p in boxes.prompts if p.box is not None] == [
        [1, 2, 9, 9],
        [3, 3, 30, 20],
    ]
    for points, some in (
        (None, np.zeros((0, 4))),
        (np.zeros((0, 1, 2)), None),
        (np.zeros((0, 1, 2)), np.zeros((0, 4))),
    ):
        assert len(small.segment_image(rgb, points, boxes=some)) == 0


def test_an_embedding_has_no_order_of_channels(small: SegmentationModel) -> None:
    embedding = small.encode(noise(8, 8))
    for wrong in (True, "no"):
        with pytest.raises(InvalidInputError, match=r"^bgr: got "):
            small.segment_image(embedding, [1, 1], bgr=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "argument"),
    [
        (("missing.png", [1, 1]), {}, ImageError, "image"),
        ((np.zeros((4, 4)), [1, 1]), {}, ImageError, "image"),
        (("photo.png", [1, 1]), {"bgr": True}, InvalidInputError, "bgr"),
        ((noise(8, 8), [1, 2, 3]), {}, PromptError, "points"),
        ((noise(8, 8), "here"), {}, PromptError, "points"),
        ((noise(8, 8), [1, [2, 3]]), {}, PromptError, "points"),
        ((noise(8, 8), [None, [[2, 3]]]), {}, PromptError, "points"),
        ((noise(8, 8), [[1, 1], [2, 2]], [1]), {}, PromptError, "labels"),
        ((noise(8, 8), [1, 1], [1, [0]]), {}, PromptError, "labels"),
        ((noise(8, 8), None, [1]), {}, PromptError, "points"),
        ((noise(8, 8), None, None, [1, 2, 3]), {}, PromptError, "boxes"),
        ((noise(8, 8), [1, 1], 1, [[1, 2, 3, 4]] * 2), {}, PromptError, "boxes"),
    ],
)
def test_wrong_arguments_are_named(
    small: SegmentationModel, arguments: Any, options: Any, error: type, argument: str
) -> None:
    with pytest.raises(error) as caught:
        small.segment_image(*arguments, **options)
    assert caught.value.argument == argument


def test_the_model_s_own_hole_filling_is_the_default(small: SegmentationModel) -> None:
    """As the predictor's, whatever the model."""
    rgb = noise(30, 40)
    predictor = SAM3InteractiveImagePredictor(small)
    predictor.set_image(rgb)
    masks, scores, _ = predictor.predict([[5, 6]], [1])
    assert small.manifest.masks.max_hole_area == 256
    found = small.segment_image(rgb, [5, 6])
    np.testing.assert_array_equal(found.masks, masks[np.argsort(-scores)] > 0)
    unfilled = small.segment_image(rgb, [5, 6], max_hole_area=0)
    assert (unfilled.area <= found.area).all()


# --- parts ----------------------------------------------------------------------------------------


def test_best_and_parts_are_results() -> None:
    corners = [np.eye(3) * k for k in (1, 1, 1, 1)]
    result = hand_made(*corners, objects=[0, 0, 1, 1])
    assert len(result) == 4
    assert result.best.scores.tolist() == result.scores[[0, 2]].tolist()
    assert result.best.objects.tolist() == [0, 1]
    assert result[-1].scores.tolist() == result.scores[3:].tolist()
    assert [len(part) for part in result] == [1, 1, 1, 1]
    assert len(result[result.objects == 1]) == 2
    assert len(result[:0].best) == 0
    with pytest.raises(IndexError):
        result[4]


def test_runs_and_masks_say_the_same(cat: Segmentation) -> None:
    runs = replace(cat, encoded=tuple(runs_of(mask) for mask in cat.masks))
    np.testing.assert_array_equal(runs.boxes, cat.boxes)
    np.testing.assert_array_equal(runs.area, cat.area)
    np.testing.assert_array_equal(runs.masks, cat.masks)
    np.testing.assert_array_equal(runs[1].masks, cat[1].masks)
    assert runs.rle() == cat.rle()
    assert np.array_equal(runs.plot(), cat.plot())


def test_results_of_one_image_can_be_joined(small: SegmentationModel) -> None:
    embedding = small.encode(noise(30, 40))
    one = small.segment_image(embedding, [5, 6])
    two = small.segment_image(embedding, boxes=[[1, 2, 9, 9], [3, 3, 30, 20]])
    whole = joined([one, two, one])
    assert whole.objects.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(whole.prompts) == 4
    for number, part in enumerate((one, two[:3], two[3:], one)):
        np.testing.assert_array_equal(whole[whole.objects == number].masks, part.masks)


# --- scores ---------------------------------------------------------------------------------------


def test_confidences_are_within_0_and_1_whatever_the_unit() -> None:
    mask = np.eye(3)
    result = replace(hand_made(mask, mask, mask), scores=np.float32([1.02, 0.5, -0.1]))
    assert result.confidence.tolist() == [1, 0.5, 0]
    odds = replace(result, scores=np.float32([6, 0, -200]), score_unit="log_odds")
    np.testing.assert_allclose(odds.confidence, [0.997527, 0.5, 0], atol=1e-6)
    assert "log-odds of the IoU 6.000" in repr(odds)
    image = np.full((3, 3, 3), 9, np.uint8)
    assert odds.to_coco()["annotations"][0]["score"] == pytest.approx(0.997527)
    assert draw_overlay(image, mask[None], [6], score_unit="log_odds").size == (3, 3)


# --- forms ----------------------------------------------------------------------------------------


def test_boxes_areas_and_polygons() -> None:
    mask = np.zeros((20, 30))
    mask[5:9, 10:16] = 1
    ring = mask.copy()
    ring[6, 12] = 0
    result = hand_made(mask, ring, np.zeros((20, 30)))
    assert result.boxes.tolist() == [[10, 5, 16, 9], [10, 5, 16, 9], [0, 0, 0, 0]]
    assert result.area.tolist() == [24, 23, 0]
    assert [[p.tolist() for p in rings] for rings in result.polygons()] == [
        [[[10, 5], [16, 5], [16, 9], [10, 9]]],
        [[[10, 5], [16, 5], [16, 9], [10, 9]]],
        [],
    ]
    assert [len(rings) for rings in result.polygons(holes=True)] == [1, 2, 0]


def test_run_lengths_are_pycocotools(cat: Segmentation) -> None:
    for rle, mask in zip(json.loads(json.dumps(cat.rle())), cat.masks, strict=True):
        assert rle["counts"] == coco.encode(np.asfortranarray(mask))["counts"].decode()
        np.testing.assert_array_equal(coco.decode(rle), mask)


def test_the_coco_document_is_one_that_pycocotools_loads(
    cat: Segmentation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat.save(tmp_path / "cat.json")
    dataset = COCO(tmp_path / "cat.json")
    capsys.readouterr()
    annotations = dataset.loadAnns(dataset.getAnnIds())
    assert [a["area"] for a in annotations] == cat.area.tolist()
    another = cat.to_coco("b.jpg", image_id=7, first_id=4)
    assert [(a["id"], a["image_id"]) for a in another["annotations"]] == [(4, 7), (5, 7), (6, 7)]
    assert [(i["id"], i["file_name"]) for i in another["images"]] == [(7, "b.jpg")]
    for annotation, mask, (x0, y0, x1, y1) in zip(
        annotations, cat.masks, cat.boxes.tolist(), strict=True
    ):
        np.testing.assert_array_equal(dataset.annToMask(annotation), mask)
        assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert coco.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_crops_are_the_object_and_nothing_else(cat: Segmentation) -> None:
    (crop,) = cat.best.crop()
    assert crop.mode == "RGBA"
    x0, y0, x1, y1 = cat.boxes[0].tolist()
    assert crop.size == (x1 - x0, y1 - y0)
    pixels, mask = np.asarray(crop), cat.masks[0, y0:y1, x0:x1]
    np.testing.assert_array_equal(pixels[..., 3] == 255, mask)
    assert cat.image is not None
    np.testing.assert_array_equal(pixels[..., :3], cat.image[y0:y1, x0:x1])
    empty = replace(hand_made(np.zeros((4, 5))), image=np.zeros((4, 5, 3), np.uint8))
    assert empty.crop()[0].size == (0, 0)


def test_plots_are_overlays_of_the_best_masks(cat: Segmentation) -> None:
    expected = draw_overlay(cat.image, cat.masks, cat.scores, points=[[225, 150]], labels=[1])
    assert np.array_equal(cat.plot(), expected)
    assert np.array_equal(
        cat[1].plot(),
        draw_overlay(cat.image, cat.masks[1:2], cat.scores[1:2], points=[[225, 150]], labels=[1]),
    )
    shown = cat._repr_png_()
    assert shown is not None
    assert shown.startswith(b"\x89PNG")


def test_many_objects_are_drawn_without_labels() -> None:
    masks = np.zeros((31, 200, 300), bool)
    masks[:, 60:90, 90:150] = True
    grey = np.full((200, 300, 3), 128, np.uint8)
    many = replace(hand_made(*masks), image=grey)
    assert np.array_equal(many.plot(), draw_overlay(grey, masks[:, None]))
    assert not np.array_equal(many[:30].plot(), draw_overlay(grey, masks[:30, None]))


def test_without_its_image_a_result_asks_for_it(
    default_model: SegmentationModel, embedding: ImageEmbedding, cat: Segmentation
) -> None:
    bare = default_model.segment_image(embedding, [225, 150])
    assert bare._repr_png_() is None
    for form in (bare.plot, bare.crop):
        with pytest.raises(InvalidInputError, match="an embedding was segmented"):
            form()
        with pytest.raises(InvalidInputError, match="451 x 300"):
            form(noise(9, 9))
    assert np.array_equal(bare.plot(cat.image), cat.plot())


def test_results_become_detections_of_supervision(cat: Segmentation) -> None:
    pytest.importorskip("supervision")
    detections = cat.to_supervision()
    np.testing.assert_array_equal(detections.mask, cat.masks)
    np.testing.assert_array_equal(detections.xyxy, cat.boxes)
    np.testing.assert_array_equal(detections.confidence, cat.confidence)
    assert detections[:1].data["object"].tolist() == [0]


def test_a_missing_library_is_named(cat: Segmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        cat.to_supervision()


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.npz"])
def test_results_are_saved_by_suffix(name: str, cat: Segmentation, tmp_path: Path) -> None:
    cat.save(tmp_path / name)
    if name == "a.npz":
        with np.load(tmp_path / name) as saved:
            np.testing.assert_array_equal(saved["masks"], cat.masks)
            np.testing.assert_array_equal(saved["boxes"], cat.boxes)
    else:
        with PIL.Image.open(tmp_path / name) as picture:
            assert picture.size == (451, 300)
            assert picture.format == {"g": "PNG", "G": "JPEG", "p": "WEBP"}[name[-1]]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_suffix_is_refused(cat: Segmentation, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"\.png, .*\.npz"):
        cat.save(tmp_path / "cat.tiff")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "side"), [("a.jpg", 65_501), ("a.webp", 16_384)])
def test_a_format_that_has_no_such_images_is_named(name: str, side: int, tmp_path: Path) -> None:
    image = np.zeros((1, side, 3), np.uint8)
    result = Segmentation(
        image[None, ..., 0] > 0,
        (1, side),
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        "iou",
        image,
    )
    with pytest.raises(InvalidInputError, match=rf"path: got '{name}' for {side} x 1 pixels"):
        result.save(tmp_path / name)
    result.save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("index", [None, [[0, 1]], np.array([[True, False, True]])])
def test_an_index_of_several_axes_is_refused(index: Any, cat: Segmentation) -> None:
    with pytest.raises(IndexError):
        cat[index]


def test_nothing_is_left_to_refine_of_a_result_without_logits() -> None:
    with pytest.raises(StateError, match="refine"):
        _ = hand_made(np.eye(3)).mask_input


# --- repr -----------------------------------------------------------------------------------------


def test_reprs_say_what_things_are(
    default_model: SegmentationModel, embedding: ImageEmbedding, cat: Segmentation
) -> None:
    assert repr(cat) == (
        "<Segmentation of an image of 451 x 300 pixels: 3 masks, 1 object, "
        "best predicted IoU 0.994>"
    )
    predictor = SAM3InteractiveImagePredictor(default_model)
    assert repr(predictor).endswith(": no image set>")
    assert "mobile_sam, onnxruntime fp32 on cpu" in repr(predictor)
    predictor.set_embedding(embedding)
    assert repr(predictor).endswith(": an image of 451 x 300 pixels set>")
    decoded = default_model.decode(embedding, sam3rt.Prompts([[1, 1]], [1]))
    assert repr(decoded) == "<DecodedMasks: 1 x 3 masks of 256 x 256 logits>"
    assert "451 x 300 pixels" in repr(embedding)
