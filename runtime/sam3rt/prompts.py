"""Prompts: what a caller may pass, checked, and how it becomes labelled points."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import flag
from .bundle import PromptSpec
from .bundle.contract import HAS_MASKS, LABELS, MASKS, PADDING_LABEL, POINTS
from .errors import PromptError, PromptWarning
from .geometry import ImageGeometry

NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3

# Memory and time of a call grow with the objects, and with the square of an object's points.
MAX_OBJECTS = 1024
MAX_POINTS = 1024
# Decoders give logits of some tens. Float32 overflows from about 1e36 on, float16 from 65504.
MAX_MASK_LOGIT = 1e4

# How far outside a point is suspicious, in sides of the image.
_MARGIN = 0.1
_PACKAGE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Prompts:
    """Prompts for one image, as a caller gives them.

    Everything may be absent; a call without any prompt is legal. B counts objects, of which a call
    takes at most :data:`MAX_OBJECTS`, with at most :data:`MAX_POINTS` points each.

    Attributes:
        point_coords: [N, 2] or [B, N, 2], (x, y) in pixels of the original image; or a list of B
            arrays [N, 2] whose N differ. Each object's result is that of a call of its own.
        point_labels: [N] or [B, N], or a list of B arrays [N]: 1 foreground, 0 background, 2 and
            3 the top left and bottom right corner of a box, -1 "not a point". The model has an
            embedding for -1: such a point has no place, and still changes the masks.
        box: [4] or [B, 4], x0, y0, x1, y1.
        mask_input: [1, h, w] or [B, 1, h, w] low-resolution logits of an earlier call, within
            plus and minus :data:`MAX_MASK_LOGIT`.
        normalize_coords: coordinates are pixels; ``False`` takes them as already in [0, 1].
    """

    point_coords: ArrayLike | Sequence[ArrayLike] | None = None
    point_labels: ArrayLike | Sequence[ArrayLike] | None = None
    box: ArrayLike | None = None
    mask_input: ArrayLike | None = None
    normalize_coords: bool = True


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts as the decoder graph reads them.

    Attributes:
        points: float32 [P, N, 2], pixels of the encoder's input; P and N may be 0.
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


class Points(NamedTuple):
    """Every object's points, padded to one number: float32 [B, N, 2] and int64 [B, N].

    Labels of padding are below -1.
    """

    coords: NDArray[np.float32]
    labels: NDArray[np.int64]


def pack(prompts: Prompts, spec: PromptSpec, geometry: ImageGeometry) -> PackedPrompts:
    """Check prompts and bring them to the decoder's form.

    Warns with :class:`~sam3rt.errors.PromptWarning` where there is no prompt at all, or where a
    point or a box's centre lies further outside the image than a tenth of its side. The model
    answers both as confidently as any other call.

    Args:
        prompts: what the caller gave.
        spec: the model's prompt rules.
        geometry: where the image lies in the encoder's input.

    Returns:
        The decoder's points, labels and masks; P is 0 for an empty set of boxes or objects.

    Raises:
        PromptError: naming the argument, what came and what was expected.
        InvalidInputError: ``normalize_coords`` is neither true nor false.
    """
    points = read_points(prompts)
    boxes = read_boxes(prompts.box)
    masks = _read_masks(prompts.mask_input, spec)
    normalize = flag("normalize_coords", prompts.normalize_coords)
    objects = _count_objects(points, boxes, masks)

    coords: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    doubt = ""
    if points is not None:
        coords.append(_to_input(points.coords, geometry, normalize, "point_coords"))
        labels.append(points.labels)
        doubt = _far_outside("a point", coords[0][points.labels > NOT_A_POINT], geometry)
    if boxes is not None:
        corners = _to_input(boxes.reshape(-1, 2, 2), geometry, normalize, "box")
        corner_labels = np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int64), (objects, 1))
        at = 0 if spec.box_position == "before_points" else len(coords)
        coords.insert(at, corners)
        labels.insert(at, corner_labels)
        doubt = doubt or _far_outside(
            "the centre of a box", (corners / np.float32(2)).sum(axis=1), geometry
        )
    if coords and (spec.padding_point == "always" or boxes is None):
        coords.append(np.zeros((objects, 1, 2), np.float32))
        labels.append(np.full((objects, 1), NOT_A_POINT, np.int64))
    if not coords:
        coords.append(np.zeros((objects, 0, 2), np.float32))
        labels.append(np.zeros((objects, 0), np.int64))
    if points is None and boxes is None and masks is None:
        doubt = "no prompt: the masks are of whatever the model finds most prominent"
    if doubt:
        warnings.warn(doubt, PromptWarning, stacklevel=_callers_level())
    return PackedPrompts(np.concatenate(coords, axis=1), np.concatenate(labels, axis=1), masks)


def _far_outside(what: str, coords: NDArray[np.float32], geometry: ImageGeometry) -> str:
    """What to say where a point of the encoder's input, [..., 2], is far outside the image."""
    flat = coords.reshape(-1, 2)
    size = np.array(geometry.input_size[::-1], np.float32)
    if not len(flat) or (
        (flat.min(axis=0) >= -_MARGIN * size).all()
        and (flat.max(axis=0) <= (1 + _MARGIN) * size).all()
    ):
        return ""
    shares = flat / size
    worst = np.abs(shares - 0.5).max(axis=1).argmax()
    height, width = geometry.original_size
    x, y = shares[worst] * np.array([width, height])
    return (
        f"{what} at ({x:.6g}, {y:.6g}) pixels, far outside the image of {width} x {height}: the "
        "masks mean nothing"
    )


def _callers_level() -> int:
    """The ``stacklevel`` of the line outside this package that called, as seen by the caller."""
    level, frame = 0, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


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
        (POINTS, np.ascontiguousarray(prompts.points[None])),
        (LABELS, np.ascontiguousarray(prompts.labels[None])),
        (MASKS, np.ascontiguousarray(masks)),
        (HAS_MASKS, np.array([prompts.masks is not None], np.float32)),
    )


def read_points(prompts: Prompts) -> Points | None:
    """Every object's points, as the caller gave them, if any.

    Raises:
        PromptError: naming the argument, what came and what was expected.
    """
    if prompts.point_coords is None:
        if prompts.point_labels is not None:
            raise PromptError("point_coords", "None with labels", "one point per label")
        return None
    if prompts.point_labels is None:
        raise PromptError("point_labels", "None with points", "one label per point")
    if _is_ragged(prompts.point_coords):
        return _pad(prompts.point_coords, prompts.point_labels)
    points = _read_equal_points(prompts.point_coords, prompts.point_labels)
    _check_counts(*points.labels.shape)
    return points


def _check_counts(objects: int, points: int) -> None:
    if objects > MAX_OBJECTS:
        raise PromptError("point_coords", f"{objects} objects", f"at most {MAX_OBJECTS} a call")
    if points > MAX_POINTS:
        raise PromptError("point_coords", f"{points} points", f"at most {MAX_POINTS} an object")


def _read_equal_points(coords_given: Any, labels_given: Any) -> Points:
    """Points of one object, or of several with equally many each."""
    coords = _real_array(coords_given, "point_coords", "[N, 2] or [B, N, 2]")
    if coords.ndim not in (2, 3) or coords.shape[-1] != 2:
        raise PromptError("point_coords", f"shape {coords.shape}", "[N, 2] or [B, N, 2]")
    labels = _labels(labels_given)
    if labels.shape != coords.shape[:-1]:
        raise PromptError(
            "point_labels",
            f"shape {labels.shape}",
            f"one label per point, shape {coords.shape[:-1]}",
        )
    if coords.ndim == 2:
        return Points(coords[None], labels[None])
    return Points(coords, labels)


def _is_ragged(value: Any) -> bool:
    """Whether a value is a list of objects with different numbers of points."""
    if not isinstance(value, list | tuple):
        return False
    try:
        return len({len(points) for points in value}) > 1 and any(
            len(point) == 2 for points in value for point in points
        )
    except TypeError:  # numbers, tensors without axes: not a list of lists of points
        return False


def _pad(coords_given: Any, labels_given: Any) -> Points:
    """Points of objects that have different numbers of them."""
    count = len(coords_given)
    if not isinstance(labels_given, list | tuple) or len(labels_given) != count:
        raise PromptError(
            "point_labels", _describe(labels_given), f"a list of {count}, one per object"
        )
    most = max(len(points) for points in coords_given)
    _check_counts(count, most)
    coords = np.zeros((count, most, 2), np.float32)
    labels = np.full((count, most), PADDING_LABEL, np.int64)
    for index, (one, one_labels) in enumerate(zip(coords_given, labels_given, strict=True)):
        # An object without points may be given as an empty list, which has no second axis.
        points = _read_equal_points(one if len(one) else np.zeros((0, 2)), one_labels)
        if len(points.coords) != 1:
            raise PromptError("point_coords", "an object with three axes", "[N, 2] for each object")
        coords[index, : len(one)] = points.coords[0]
        labels[index, : len(one)] = points.labels[0]
    return Points(coords, labels)


def _describe(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"shape {np.shape(value)}" if isinstance(value, np.ndarray) else type(value).__name__


def _labels(value: Any) -> NDArray[np.int64]:
    labels = _array(value, "point_labels", "whole numbers -1..3")
    if labels.dtype.kind not in "biuf":
        raise PromptError("point_labels", f"dtype {labels.dtype}", "whole numbers -1..3")
    known = (NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
    # Not numpy.isin, which before NumPy 2 fails on unsigned numbers that no signed type holds.
    wrong = ~np.logical_or.reduce([labels == code for code in known])
    if wrong.any():
        raise PromptError("point_labels", f"{labels[wrong].flat[0]}", "whole numbers -1..3")
    return labels.astype(np.int64)


def read_boxes(value: ArrayLike | None) -> NDArray[np.float32] | None:
    """Every object's box, float32 [B, 4], if any.

    Raises:
        PromptError: naming what came and what was expected.
    """
    if value is None:
        return None
    boxes = _real_array(value, "box", "[4] or [B, 4]")
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
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
    given = _array(value, "mask_input", expected)
    if given.dtype.kind in "bu":
        raise PromptError(
            "mask_input",
            f"dtype {given.dtype}",
            f"{expected}, positive inside; of a binary mask make numpy.where(mask, 10.0, -10.0)",
        )
    masks = _real_array(given, "mask_input", expected)
    if masks.ndim not in (3, 4) or masks.shape[-3:] != (1, height, width) or masks.shape[0] == 0:
        raise PromptError("mask_input", f"shape {masks.shape}", expected)
    largest = max(float(masks.max()), -float(masks.min()))
    if largest > MAX_MASK_LOGIT:
        raise PromptError(
            "mask_input", f"a value of {largest:.6g}", f"logits within +-{MAX_MASK_LOGIT:g}"
        )
    return np.ascontiguousarray(masks.reshape(-1, height, width))


def _count_objects(
    points: Points | None,
    boxes: NDArray[np.float32] | None,
    masks: NDArray[np.float32] | None,
) -> int:
    for argument, array in (("box", boxes), ("mask_input", masks)):
        if array is not None and len(array) > MAX_OBJECTS:
            raise PromptError(argument, f"{len(array)} objects", f"at most {MAX_OBJECTS} a call")
    if points is not None and boxes is not None and len(points.coords) != len(boxes):
        raise PromptError(
            "box",
            f"{len(boxes)} boxes",
            f"one box per object with points ({len(points.coords)})",
        )
    if points is None and boxes is None:
        return 1 if masks is None else len(masks)
    objects = len(points.coords) if points is not None else len(boxes) if boxes is not None else 1
    if masks is not None and len(masks) not in (1, objects):
        raise PromptError(
            "mask_input", f"{len(masks)} masks", f"one mask, or one per object ({objects})"
        )
    return objects


def _to_input(
    coords: NDArray[np.float32], geometry: ImageGeometry, normalize: bool, argument: str
) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        mapped = geometry.to_input(coords, normalize)
    if not np.isfinite(mapped).all():
        raise PromptError(
            argument, "coordinates too large for float32", "coordinates near the image"
        )
    return mapped


def _real_array(value: Any, argument: str, expected: str) -> NDArray[np.float32]:
    array = _array(value, argument, expected)
    # NumPy has no bfloat16 of its own: that of ml_dtypes, which JAX uses, is of kind "V".
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise PromptError(argument, f"dtype {array.dtype}", f"numbers, {expected}")
    with np.errstate(over="ignore"):
        result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise PromptError(argument, "NaN or infinite values", f"finite numbers, {expected}")
    return result


def _array(value: Any, argument: str, expected: str) -> NDArray[Any]:
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(np.ma.is_masked(part) for part in parts if isinstance(part, np.ma.MaskedArray)):
        raise PromptError(argument, "a masked array with masked values", f"every value, {expected}")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: tensors
        raise PromptError(
            argument,
            f"{type(value).__name__} that NumPy cannot read ({error})",
            f"{expected}, as an array of NumPy or a list (of a tensor, for example, "
            ".detach().cpu().float())",
        ) from error
