"""Prompts: what a caller may pass, checked, and how it becomes labelled points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle import PromptSpec
from .errors import PromptError
from .geometry import ImageGeometry

IGNORED, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3


@dataclass(frozen=True)
class Prompts:
    """Prompts for one image, as a caller gives them.

    Everything may be absent; a call without any prompt is legal. B counts objects.

    Attributes:
        point_coords: [N, 2] or [B, N, 2], (x, y) in pixels of the original image.
        point_labels: [N] or [B, N]: 1 foreground, 0 background, -1 ignored, 2 and 3 the top
            left and bottom right corner of a box.
        box: [4] or [B, 4], x0, y0, x1, y1.
        mask_input: [1, h, w] or [B, 1, h, w] low-resolution logits of an earlier call.
        normalize_coords: coordinates are pixels; ``False`` takes them as already in [0, 1].
    """

    point_coords: ArrayLike | None = None
    point_labels: ArrayLike | None = None
    box: ArrayLike | None = None
    mask_input: ArrayLike | None = None
    normalize_coords: bool = True


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts as the decoder graph reads them.

    Attributes:
        points: float32 [P, N, 2], pixels of the encoder's input; N may be 0.
        labels: int64 [P, N].
        masks: float32 [M, h, w] with M 1 or P, or ``None``.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32] | None

    def split(self, objects: int) -> list[PackedPrompts]:
        """The same prompts in parts of at most so many objects; no part where there are none."""
        if 0 < len(self.labels) <= objects:
            return [self]
        shared = self.masks is None or len(self.masks) == 1
        parts = [slice(i, i + objects) for i in range(0, len(self.labels), objects)]
        return [
            PackedPrompts(
                self.points[part],
                self.labels[part],
                self.masks if shared or self.masks is None else self.masks[part],
            )
            for part in parts
        ]


def pack(prompts: Prompts, spec: PromptSpec, place: ImageGeometry) -> PackedPrompts:
    """Check prompts and bring them to the decoder's form.

    Args:
        prompts: what the caller gave.
        spec: the model's prompt rules.
        place: where the image lies in the encoder's input.

    Raises:
        PromptError: naming the argument, what came and what was expected.
    """
    points, labels = _read_points(prompts)
    boxes = _read_boxes(prompts.box)
    masks = _read_masks(prompts.mask_input, spec)
    objects = _count_objects(points, boxes, masks)

    coords: list[NDArray[np.float32]] = []
    codes: list[NDArray[np.int64]] = []
    if points is not None and labels is not None:
        argument = "point_coords"
        coords.append(_to_input(points, place, prompts.normalize_coords, argument))
        codes.append(labels)
    if boxes is not None:
        corners = _to_input(boxes.reshape(-1, 2, 2), place, prompts.normalize_coords, "box")
        corner_codes = np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int64), (objects, 1))
        at = 0 if spec.box_position == "before_points" else len(coords)
        coords.insert(at, corners)
        codes.insert(at, corner_codes)
    if coords and (spec.padding_point == "always" or boxes is None):
        coords.append(np.zeros((objects, 1, 2), np.float32))
        codes.append(np.full((objects, 1), IGNORED, np.int64))
    if not coords:
        coords.append(np.zeros((objects, 0, 2), np.float32))
        codes.append(np.zeros((objects, 0), np.int64))
    return PackedPrompts(np.concatenate(coords, axis=1), np.concatenate(codes, axis=1), masks)


def decoder_inputs(
    prompts: PackedPrompts, no_mask: NDArray[np.float32]
) -> tuple[tuple[str, NDArray[Any]], ...]:
    """What the decoder takes beside the feature maps, by name, contiguous in memory.

    Args:
        prompts: packed.
        no_mask: float32 [1, 1, h, w], which stands where there is no mask prompt.
    """
    masks = no_mask if prompts.masks is None else prompts.masks[None]
    return (
        ("input_points", np.ascontiguousarray(prompts.points[None])),
        ("input_labels", np.ascontiguousarray(prompts.labels[None])),
        ("input_masks", np.ascontiguousarray(masks)),
        ("has_input_masks", np.array([prompts.masks is not None], np.float32)),
    )


def _read_points(
    prompts: Prompts,
) -> tuple[NDArray[np.float32] | None, NDArray[np.int64] | None]:
    if prompts.point_coords is None:
        if prompts.point_labels is not None:
            raise PromptError("point_coords", "None with point_labels given", "one point per label")
        return None, None
    if prompts.point_labels is None:
        raise PromptError("point_labels", "None with point_coords given", "one label per point")
    coords = _real_array(prompts.point_coords, "point_coords", "[N, 2] or [B, N, 2]")
    no_object = coords.ndim == 3 and len(coords) == 0
    if coords.ndim not in (2, 3) or coords.shape[-1] != 2 or no_object:
        raise PromptError("point_coords", f"shape {coords.shape}", "[N, 2] or [B, N, 2]")
    labels = _labels(prompts.point_labels)
    if labels.shape != coords.shape[:-1]:
        raise PromptError(
            "point_labels",
            f"shape {labels.shape}",
            f"one label per point, shape {coords.shape[:-1]}",
        )
    if coords.ndim == 2:
        return coords[None], labels[None]
    return coords, labels


def _labels(value: ArrayLike) -> NDArray[np.int64]:
    labels = _array(value, "point_labels", "whole numbers -1..3")
    if labels.dtype.kind not in "biuf":
        raise PromptError("point_labels", f"dtype {labels.dtype}", "whole numbers -1..3")
    with np.errstate(invalid="ignore"):
        wrong = ~np.isin(labels, (IGNORED, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT))
    if wrong.any():
        raise PromptError("point_labels", f"{labels[wrong].flat[0]}", "whole numbers -1..3")
    return labels.astype(np.int64)


def _read_boxes(value: ArrayLike | None) -> NDArray[np.float32] | None:
    if value is None:
        return None
    boxes = _real_array(value, "box", "[4] or [B, 4]")
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4 or boxes.shape[0] == 0:
        raise PromptError("box", f"shape {boxes.shape}", "[4] or [B, 4], x0, y0, x1, y1")
    boxes = boxes.reshape(-1, 4)
    turned = (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
    if turned.any():
        raise PromptError("box", f"{boxes[turned][0].tolist()}", "x0 <= x1 and y0 <= y1")
    return boxes


def _read_masks(value: ArrayLike | None, spec: PromptSpec) -> NDArray[np.float32] | None:
    if value is None:
        return None
    height, width = spec.mask_size
    expected = f"[1, {height}, {width}] or [B, 1, {height}, {width}] low-resolution logits"
    masks = _real_array(value, "mask_input", expected)
    if masks.ndim not in (3, 4) or masks.shape[-3:] != (1, height, width) or masks.shape[0] == 0:
        raise PromptError("mask_input", f"shape {masks.shape}", expected)
    return np.ascontiguousarray(masks.reshape(-1, height, width))


def _count_objects(
    points: NDArray[np.float32] | None,
    boxes: NDArray[np.float32] | None,
    masks: NDArray[np.float32] | None,
) -> int:
    if points is not None and boxes is not None and len(points) != len(boxes):
        raise PromptError(
            "box", f"{len(boxes)} boxes", f"one box per object of point_coords ({len(points)})"
        )
    if points is None and boxes is None:
        return 1 if masks is None else len(masks)
    objects = len(points) if points is not None else len(boxes) if boxes is not None else 1
    if masks is not None and len(masks) not in (1, objects):
        raise PromptError(
            "mask_input", f"{len(masks)} masks", f"one mask, or one per object ({objects})"
        )
    return objects


def _to_input(
    coords: NDArray[np.float32], place: ImageGeometry, normalize: bool, argument: str
) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        mapped = place.to_input(coords, normalize)
    if not np.isfinite(mapped).all():
        raise PromptError(
            argument, "coordinates too large for float32", "coordinates near the image"
        )
    return mapped


def _real_array(value: ArrayLike, argument: str, expected: str) -> NDArray[np.float32]:
    array = _array(value, argument, expected)
    if array.dtype.kind not in "biuf":
        raise PromptError(argument, f"dtype {array.dtype}", f"numbers, {expected}")
    with np.errstate(over="ignore"):
        result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise PromptError(argument, "NaN or infinite values", f"finite numbers, {expected}")
    return result


def _array(value: Any, argument: str, expected: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: tensors
        raise PromptError(argument, f"{type(value).__name__} ({error})", expected) from error
