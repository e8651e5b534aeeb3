"""Everything in an image: SAM's automatic mask generator, with its parameters and defaults.

A grid of points is laid over the image, and over crops of it if asked to; each point gives three
masks. What the model itself thinks little of is dropped, then what changes much with the threshold,
then duplicates. As in SAM, logits are judged at the size of the image or crop: one mask at a time,
so that memory does not grow with their number. What is kept is kept as runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .arguments import instance, number, whole
from .embedding import ImageEmbedding
from .errors import InvalidInputError
from .geometry import Image, to_rgb
from .masks import upsample
from .masks.components import remove_small_regions
from .masks.rle import Runs, box_around, box_of, mask_of, runs_of
from .model import SegmentationModel
from .prompts import MAX_OBJECTS, Prompts
from .results import Segmentation, confidence

# SAM's tolerance for a box that ends at the edge of a crop, pixels.
_EDGE = 20.0
# The largest grid: 4 million masks.
_MOST_POINTS_PER_SIDE = 1024
_MOST_LAYERS = 5

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Found:
    """One mask: its runs and what is known of it; boxes as SAM has them, x1 and y1 inside."""

    runs: Runs
    box: Box
    score: float
    stability: float
    point: tuple[float, float]
    crop: Box


class AutomaticMaskGenerator:
    """Finds all objects in an image, as ``SamAutomaticMaskGenerator`` does.

    Args:
        model: from :func:`sam3rt.load_model`.
        points_per_side: of the grid over the image.
        points_per_batch: points of one decoder call.
        pred_iou_thresh: masks are dropped whose predicted IoU is not above it.
        stability_score_thresh: masks are dropped whose stability is below it: the IoU of the
            masks at two thresholds.
        stability_score_offset: how far these are above and below the usual one.
        box_nms_thresh: of two masks whose boxes have an IoU above it, the worse is dropped.
        crop_n_layers: how often the image is cut up: layer n has 4^n crops.
        crop_nms_thresh: as ``box_nms_thresh``, between crops; masks of smaller crops win.
        crop_overlap_ratio: how far crops of the first layer overlap, as a share of the image's
            shorter side; half as far in each further layer.
        crop_n_points_downscale_factor: by how much the grid gets coarser with each layer.
        min_mask_region_area: holes and islands smaller than this are removed, pixels.

    Raises:
        InvalidInputError: an argument makes no sense.
    """

    def __init__(
        self,
        model: SegmentationModel,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: float = 0,
    ) -> None:
        instance("model", model, SegmentationModel, "a model from sam3rt.load_model")
        self.model = model
        self.points_per_side = whole("points_per_side", points_per_side, 1, _MOST_POINTS_PER_SIDE)
        self.points_per_batch = whole("points_per_batch", points_per_batch, 1, MAX_OBJECTS)
        self.pred_iou_thresh = number("pred_iou_thresh", pred_iou_thresh)
        self.stability_score_thresh = number("stability_score_thresh", stability_score_thresh)
        self.stability_score_offset = number("stability_score_offset", stability_score_offset, 0)
        self.box_nms_thresh = number("box_nms_thresh", box_nms_thresh, 0)
        self.crop_n_layers = whole("crop_n_layers", crop_n_layers, 0, _MOST_LAYERS)
        self.crop_nms_thresh = number("crop_nms_thresh", crop_nms_thresh, 0)
        self.crop_overlap_ratio = number("crop_overlap_ratio", crop_overlap_ratio, 0)
        self.crop_n_points_downscale_factor = whole(
            "crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1, 1 << 20
        )
        self.min_mask_region_area = number("min_mask_region_area", min_mask_region_area, 0)
        if points_per_side // self.crop_n_points_downscale_factor**crop_n_layers < 1:
            raise InvalidInputError(
                "crop_n_points_downscale_factor",
                f"{crop_n_points_downscale_factor}, which leaves no point in layer {crop_n_layers}",
                f"a smaller one, or more points_per_side than {points_per_side}",
            )

    def __repr__(self) -> str:
        points = f"{self.points_per_side} x {self.points_per_side} points"
        return f"<AutomaticMaskGenerator of {points} on {self.model!r}>"

    def generate(self, image: Image) -> Segmentation:
        """Find all objects.

        Args:
            image: uint8 [H, W, 3] RGB or a PIL image; see :func:`sam3rt.geometry.to_rgb`.

        Returns:
            The masks as runs, each an object of its own, in SAM's order: the best first, where
            there are no crops. ``stability_scores``, ``point_coords`` and ``crop_boxes`` are set.

        Raises:
            ImageError: the image cannot be used.
            BackendError: the backend failed.
        """
        rgb = to_rgb(image)
        size = (rgb.shape[0], rgb.shape[1])
        found: list[_Found] = []
        for crop, layer in crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio):
            found += self._in_crop(rgb, crop, layer)
        if self.crop_n_layers > 0:
            areas = [(f.crop[2] - f.crop[0]) * (f.crop[3] - f.crop[1]) for f in found]
            found = _without_duplicates(found, [1 / area for area in areas], self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            found = self._tidied(found, size)
        return Segmentation(
            tuple(f.runs for f in found),
            size,
            np.array([f.score for f in found], np.float32),
            np.arange(len(found)),
            self.model.score_unit,
            rgb,
            stability_scores=np.array([f.stability for f in found], np.float32),
            point_coords=np.array([f.point for f in found], np.float64).reshape(-1, 2),
            crop_boxes=np.array([f.crop for f in found], np.int64).reshape(-1, 4),
        )

    def _in_crop(self, rgb: NDArray[np.uint8], crop: Box, layer: int) -> list[_Found]:
        """What is found in one crop, in pixels of the image."""
        x0, y0, x1, y1 = crop
        embedding = self.model.encode(rgb[y0:y1, x0:x1])
        per_side = int(self.points_per_side / self.crop_n_points_downscale_factor**layer)
        points = point_grid(per_side) * np.array([x1 - x0, y1 - y0])
        found: list[_Found] = []
        for first in range(0, len(points), self.points_per_batch):
            batch = points[first : first + self.points_per_batch]
            found += self._of_points(embedding, batch, crop, (rgb.shape[0], rgb.shape[1]))
        return _without_duplicates(found, [f.score for f in found], self.box_nms_thresh)

    def _of_points(
        self,
        embedding: ImageEmbedding,
        points: NDArray[np.float64],
        crop: Box,
        size: tuple[int, int],
    ) -> Iterator[_Found]:
        """The masks of one decoder call that pass."""
        ones = np.ones((len(points), 1), np.int64)
        decoded = self.model.decode(embedding, Prompts(points[:, None], ones))
        ious = decoded.iou_predictions  # SAM compares what is above 1, too
        if self.model.score_unit == "log_odds":
            ious = confidence(ious, "log_odds")
        manifest = self.model.manifest
        logits = np.empty(embedding.original_size, np.float32)
        x0, y0, _, _ = crop
        for index, mask in zip(*np.nonzero(self._likely(ious)), strict=True):
            upsample(
                decoded.low_res_masks[index, mask],
                embedding.geometry,
                manifest.image,
                manifest.masks,
                logits,
            )
            stability = self._stability(logits)
            if self.stability_score_thresh > 0 and not stability >= np.float32(
                self.stability_score_thresh
            ):
                continue
            inside = logits > 0
            left, top, right, bottom = _ends_inside(box_around(inside))
            box = (left + x0, top + y0, right + x0, bottom + y0)
            if _is_cut(box, crop, size):
                continue
            if inside.shape != size:
                whole = np.zeros(size, np.bool_)
                whole[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] = inside
                inside = whole
            yield _Found(
                runs_of(inside),
                box,
                float(decoded.iou_predictions[index, mask]),
                stability,
                (float(points[index, 0]) + x0, float(points[index, 1]) + y0),
                crop,
            )

    def _likely(self, ious: NDArray[np.float32]) -> NDArray[np.bool_]:
        if self.pred_iou_thresh <= 0:
            return np.ones(ious.shape, np.bool_)
        likely: NDArray[np.bool_] = ious > np.float32(self.pred_iou_thresh)
        return likely

    def _stability(self, logits: NDArray[np.float32]) -> float:
        """The IoU of the masks at a higher and a lower threshold; NaN where both are empty."""
        offset = np.float32(self.stability_score_offset)
        union = np.float32(np.count_nonzero(logits > -offset))
        return float(np.float32(np.count_nonzero(logits > offset)) / union) if union else math.nan

    def _tidied(self, found: list[_Found], size: tuple[int, int]) -> list[_Found]:
        """Without small holes and islands, nor what has become a duplicate by that."""
        tidied, unchanged = [], []
        for one in found:
            mask = mask_of(one.runs, size)
            changed = remove_small_regions(mask, self.min_mask_region_area)
            unchanged.append(float(changed is mask))
            if changed is not mask:
                runs = runs_of(changed)
                one = replace(one, runs=runs, box=_ends_inside(box_of(runs, size[0])))
            tidied.append(one)
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        return _without_duplicates(tidied, unchanged, threshold)


def point_grid(per_side: int) -> NDArray[np.float64]:
    """Points at the centres of a grid over the unit square, float64 [per_side^2, 2], by rows."""
    offset = 1 / (2 * per_side)
    side = np.linspace(offset, 1 - offset, per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def crop_boxes(
    size: tuple[int, int], layers: int, overlap_ratio: float
) -> Iterator[tuple[Box, int]]:
    """The whole image, then each layer's crops: x0, y0, x1, y1 and the layer's number.

    Those that SAM has without a pixel, where an image has fewer pixels than crops, are left out.
    """
    height, width = size
    yield (0, 0, width, height), 0
    for layer in range(1, layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / per_side))
        crop_width, crop_height = (
            math.ceil((overlap * (per_side - 1) + side) / per_side) for side in (width, height)
        )
        for column, row in itertools.product(range(per_side), range(per_side)):
            x0, y0 = (crop_width - overlap) * column, (crop_height - overlap) * row
            if x0 < width and y0 < height:
                yield (x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)), layer


def _ends_inside(box: Box) -> Box:
    """A box whose x1 and y1 are just outside as SAM has it."""
    x0, y0, x1, y1 = box
    return x0, y0, max(x1 - 1, 0), max(y1 - 1, 0)


def _is_cut(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a box ends at an edge of a crop that is not the image's."""
    edges = (0, 0, size[1], size[0])
    return any(
        abs(a - b) <= _EDGE and not abs(a - c) <= _EDGE
        for a, b, c in zip(box, crop, edges, strict=True)
    )


def _without_duplicates(found: list[_Found], scores: list[float], threshold: float) -> list[_Found]:
    """Non-maximum suppression by boxes, best score first, as torchvision's."""
    boxes = np.array([f.box for f in found], np.float32).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-np.array(scores, np.float32), kind="stable")
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(found[best])
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.maximum(high - low, 0).prod(axis=1)
        with np.errstate(invalid="ignore"):  # two boxes without an area
            iou = shared / (areas[best] + areas[rest] - shared)
        order = rest[~(iou > threshold)]
    return kept
