"""The automatic mask generator: against SAM's own, and piece by piece."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.helpers import edit_manifest, noise, photo
from tests.support.plain_predictor import MOBILE_SAM, PlainPredictor
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt import AutomaticMaskGenerator, ImageError, InvalidInputError, SegmentationModel
from sam3rt.automatic import crop_boxes, point_grid
from sam3rt.bundle.default import default_bundle_path
from sam3rt.masks.components import remove_small_regions
from sam3rt.results import Segmentation

# The golden tolerances.
_SCORE = 1e-3
_PIXELS = 1e-3


# --- SAM's own generator --------------------------------------------------------------------------


def mobile_sam(module: str) -> Any:
    """A module of MobileSAM's own code, which comes with SAM's generator."""
    pytest.importorskip("torch")
    import sam3rt_export.references  # noqa: F401  (makes torchvision importable)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"mobile_sam.{module}")


class Predictor:
    """What SAM's generator asks of its predictor, by the plain one on the same two graphs."""

    def __init__(self) -> None:
        self._plain = PlainPredictor(default_bundle_path(), MOBILE_SAM)
        self._finish = mobile_sam("modeling.sam").Sam.postprocess_masks
        self.device = "cpu"
        self.model = SimpleNamespace(
            mask_threshold=0.0, image_encoder=SimpleNamespace(img_size=1024)
        )
        self.transform = SimpleNamespace(apply_coords=lambda coords, size: coords)

    def set_image(self, image: NDArray[np.uint8]) -> None:
        self._plain.set_image(image)
        scale = 1024 / max(image.shape)
        self._filled = tuple(int(side * scale + 0.5) for side in image.shape[:2])
        self._size = image.shape[:2]

    def reset_image(self) -> None:
        pass

    def predict_torch(self, points: Any, labels: Any, **options: Any) -> Any:
        import torch

        assert options == {"multimask_output": True, "return_logits": True}
        low_res, ious = self._plain.decode(
            points.numpy(), labels.numpy(), None, None, multimask=True, in_pixels=True
        )
        logits = self._finish(self.model, torch.tensor(low_res), self._filled, self._size)
        return logits, torch.tensor(ious), None


def suppressed(boxes: Any, scores: Any, _: Any, iou_threshold: float) -> Any:
    """torchvision's ``batched_nms`` for one category, whose compiled part is not always there."""
    import torch

    def iou(a: list[float], b: list[float]) -> float:
        shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        shared *= max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
        return shared / both if both else 0.0

    kept: list[int] = []
    rows = boxes.tolist()
    for index in torch.sort(scores, stable=True, descending=True)[1].tolist():
        if all(iou(rows[index], rows[other]) <= iou_threshold for other in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long)


def by_sam(image: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """What SAM's own generator finds."""
    theirs = mobile_sam("automatic_mask_generator")
    monkeypatch.setattr(theirs, "batched_nms", suppressed)
    monkeypatch.setattr(theirs, "SamPredictor", lambda model: model)
    return theirs.SamAutomaticMaskGenerator(Predictor(), **options).generate(image)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("coffee", {"points_per_side": 6}),
    "everything": (
        "astronaut",
        {
            "points_per_side": 4,
            "points_per_batch": 10,
            "crop_n_layers": 1,
            "crop_n_points_downscale_factor": 2,
            "crop_overlap_ratio": 0.3,
            "crop_nms_thresh": 0.6,
            "pred_iou_thresh": 0.7,
            "stability_score_thresh": 0.8,
            "stability_score_offset": 0.7,
            "box_nms_thresh": 0.8,
            "min_mask_region_area": 150,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_sam_s_own_generator(
    name: str, default_model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, options = CASES[name]
    if "min_mask_region_area" in options:
        pytest.importorskip("cv2")
    rgb = photo(image)
    expected = by_sam(rgb, monkeypatch, **options)
    found = AutomaticMaskGenerator(default_model, **options).generate(rgb)
    assert len(found) == len(expected) >= 6
    assert found.point_coords is not None
    assert found.crop_boxes is not None
    assert found.stability_scores is not None
    for index, record in enumerate(expected):
        mask, right = found[index].masks[0], record["segmentation"]
        assert np.count_nonzero(mask != right) <= _PIXELS * mask.size
        assert found.scores[index] == pytest.approx(record["predicted_iou"], abs=_SCORE)
        assert found.stability_scores[index] == pytest.approx(record["stability_score"], abs=_SCORE)
        np.testing.assert_allclose(found.point_coords[index], record["point_coords"][0])
        x0, y0, x1, y1 = found.crop_boxes[index].tolist()
        assert [x0, y0, x1 - x0, y1 - y0] == record["crop_box"]
        x0, y0, x1, y1 = found.boxes[index].tolist()
        np.testing.assert_allclose([x0, y0, x1 - 1 - x0, y1 - 1 - y0], record["bbox"], atol=2)


@pytest.mark.parametrize("size", [(400, 600), (301, 77), (9, 9)])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("ratio", [0.0, 512 / 1500])
def test_crops_and_grids_are_those_of_sam(size: Any, layers: int, ratio: float) -> None:
    amg = mobile_sam("utils.amg")

    import sam3rt_export.references  # noqa: F401  (makes torchvision importable)

    theirs = zip(*amg.generate_crop_boxes(size, layers, ratio), strict=True)
    assert [(list(box), n) for box, n in crop_boxes(size, layers, ratio)] == [
        (box, n) for box, n in theirs if box[0] < box[2] and box[1] < box[3]
    ]
    for per_side in (1, 2, 7, 32):
        np.testing.assert_array_equal(point_grid(per_side), amg.build_point_grid(per_side))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("area", [1, 4, 9.5, 10_000])
def test_small_regions_go_as_in_sam(share: float, area: float) -> None:
    pytest.importorskip("cv2")
    amg = mobile_sam("utils.amg")

    for seed in range(20):
        mask = np.random.default_rng(seed).random((25, 30)) < share
        filled, changed = amg.remove_small_regions(mask, area, mode="holes")
        right, also = amg.remove_small_regions(filled, area, mode="islands")
        found = remove_small_regions(mask, area)
        assert (found is not mask) == (changed or also)
        if right.sum() == found.sum() < area:
            continue  # of several islands of one size, all too small, either keeps another
        np.testing.assert_array_equal(found, right)


def test_crops_overlap_and_cover_the_image() -> None:
    boxes = list(crop_boxes((300, 400), 2, 0.4))
    assert [layer for _, layer in boxes] == [0] + [1] * 4 + [2] * 16
    assert boxes[:3] == [((0, 0, 400, 300), 0), ((0, 0, 260, 210), 1), ((0, 90, 260, 300), 1)]
    for layer in (1, 2):
        covered = np.zeros((300, 400), bool)
        for (x0, y0, x1, y1), number in boxes:
            if number == layer:
                covered[y0:y1, x0:x1] = True
        assert covered.all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (9, 3)])
def test_images_of_fewer_pixels_than_crops(small: SegmentationModel, shape: Any) -> None:
    generator = AutomaticMaskGenerator(
        small, 2, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=2
    )
    assert generator.generate(noise(*shape)).size == shape


def test_small_holes_and_islands_go_and_the_largest_stays() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:12, 2:12] = True
    mask[5:7, 5:7] = False
    mask[15:17, 20:23] = True
    assert remove_small_regions(mask, 4) is mask
    assert remove_small_regions(mask, 5).sum() == 100 + 6
    assert remove_small_regions(mask, 6.5).sum() == 100
    assert remove_small_regions(mask, 99).sum() == 100
    assert remove_small_regions(mask[13:], 99).sum() == 6
    assert not remove_small_regions(np.zeros((3, 3), bool), 1).any()


# --- on a model of a few nodes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SegmentationModel:
    folder = tmp_path_factory.mktemp("automatic") / "bundle"
    runnable_bundle(folder)
    edit_manifest(folder, lambda document: document.update(model_type="mobile_sam"))
    return sam3rt.load_model(folder, backend="onnxruntime", device="cpu")


LENIENT: dict[str, Any] = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}


def test_every_mask_of_every_point_is_there_where_nothing_is_dropped(
    small: SegmentationModel,
) -> None:
    rgb = noise(30, 40)
    found = AutomaticMaskGenerator(small, 3, 4, **LENIENT).generate(rgb)
    assert isinstance(found, Segmentation)
    assert len(found) == 27
    assert found.objects.tolist() == list(range(27))
    assert sorted(-found.scores) == (-found.scores).tolist()
    assert found.point_coords is not None
    corner = found[np.isclose(found.point_coords, [40 / 6, 5]).all(axis=1)]
    alone = small.segment_image(rgb, [40 / 6, 5], max_hole_area=0)
    np.testing.assert_array_equal(corner.masks, alone.masks)
    np.testing.assert_array_equal(corner.scores, alone.scores)
    assert found.plot().size == (40, 30)


def test_thresholds_drop_masks(small: SegmentationModel) -> None:
    rgb = noise(30, 40)
    everything = AutomaticMaskGenerator(small, 3, **LENIENT).generate(rgb)
    assert everything.stability_scores is not None
    for name, values in (
        ("pred_iou_thresh", everything.scores),
        ("stability_score_thresh", everything.stability_scores),
    ):
        limit = float(np.median(values[values > 0]))
        some = AutomaticMaskGenerator(small, 3, **{**LENIENT, name: limit}).generate(rgb)
        above = values > limit if name == "pred_iou_thresh" else values >= limit
        assert 0 < len(some) < len(everything)
        assert len(some) == above.sum()
    strict = AutomaticMaskGenerator(small, 3, **{**LENIENT, "box_nms_thresh": 0.0}).generate(rgb)
    assert 0 < len(strict) < len(everything)
    none = AutomaticMaskGenerator(small, 3, pred_iou_thresh=1e6).generate(rgb)
    assert len(none) == 0
    assert none.masks.shape == (0, 30, 40)
    assert none.to_coco()["annotations"] == []
    assert none.plot().size == (40, 30)


def test_logits_of_full_size_are_never_held_for_many(
    small: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One array of the image's size serves all masks."""
    from sam3rt import automatic

    arrays = set()
    upsample = automatic.upsample

    def noted(*arguments: Any) -> None:
        arrays.add(id(arguments[4]))
        upsample(*arguments)

    monkeypatch.setattr(automatic, "upsample", noted)
    AutomaticMaskGenerator(small, 4, 16, **LENIENT).generate(noise(30, 40))
    assert len(arrays) == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("points_per_side", 0),
        ("points_per_side", 2.5),
        ("points_per_batch", 100_000),
        ("pred_iou_thresh", "high"),
        ("pred_iou_thresh", 10**400),
        ("stability_score_thresh", np.complex64(1)),
        ("stability_score_offset", -1.0),
        ("box_nms_thresh", float("nan")),
        ("crop_n_layers", -1),
        ("crop_n_layers", 9),
        ("min_mask_region_area", -3),
        ("crop_n_points_downscale_factor", 0),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_arguments_are_named(small: SegmentationModel, argument: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        AutomaticMaskGenerator(small, **{argument: value})
    assert caught.value.argument == argument


def test_a_layer_without_a_point_is_refused(small: SegmentationModel) -> None:
    with pytest.raises(InvalidInputError, match="no point in layer 2"):
        AutomaticMaskGenerator(small, 8, crop_n_layers=2, crop_n_points_downscale_factor=3)
    with pytest.raises(InvalidInputError, match="model"):
        AutomaticMaskGenerator("mobile_sam")  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        AutomaticMaskGenerator(small, 1).generate(np.zeros((3, 3)))  # type: ignore[arg-type]


def test_the_command_line_finds_everything(
    small: SegmentationModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import PIL.Image

    from sam3rt.cli import main

    rgb = noise(30, 40)
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(rgb).save(tmp_path / name)
    expected = AutomaticMaskGenerator(small, 3, **LENIENT)
    masks = expected.generate(rgb)
    assert len(masks) > 1
    model = ("--bundle", str(small.bundle.path), "--backend", "onnxruntime", "--device", "cpu")
    how = ("--everything", "--points-per-side", "3", "--pred-iou-thresh", "0")
    how += ("--stability-score-thresh", "0", "--box-nms-thresh", "1")
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "a.png"), *how, *model, "-o", str(out)]) == 0
    assert len(list(out.glob("mask_*.png"))) == len(masks)
    both = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), *how, *model, "--format", "coco"]
    assert main(["segment", *both, "-o", str(tmp_path / "coco")]) == 0
    from pycocotools.coco import COCO

    dataset = COCO(tmp_path / "coco" / "annotations.json")
    annotations = dataset.loadAnns(dataset.getAnnIds(imgIds=2))
    assert [a["area"] for a in annotations] == masks.area.tolist()
    capsys.readouterr()
    assert main(["segment", *both, "--point", "1,1", "-o", str(tmp_path / "no")]) == 1
    assert "--everything" in capsys.readouterr().err
