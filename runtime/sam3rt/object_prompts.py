"""Prompts as people write them, object by object."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .prompts import NOT_A_POINT, Prompts, read_boxes, read_points

# The names of prompts where callers write them object by object.
WRITTEN_AS = {"point_coords": "points", "point_labels": "labels", "box": "boxes"}


@dataclass(frozen=True)
class ObjectPrompts:
    """What was asked of one object.

    Attributes:
        points: float32 [N, 2], (x, y) in pixels of the image.
        labels: int64 [N], see :class:`sam3rt.prompts.Prompts`.
        box: float32 [4], x0, y0, x1, y1, or ``None``.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    box: NDArray[np.float32] | None


def with_labels(points: Any, labels: Any = None) -> tuple[Any, Any]:
    """Points and labels as :class:`sam3rt.prompts.Prompts` takes them, which also checks them.

    Args:
        points: one (x, y), what ``Prompts`` takes, or ``None``.
        labels: one label for one point, what ``Prompts`` takes, or ``None`` for 1 everywhere.
    """
    try:
        array = None if points is None else np.asarray(points)
    except (ValueError, TypeError, RuntimeError):  # objects with different numbers of points, or
        with contextlib.suppress(TypeError):  # no numbers, of which what checks points says so
            labels = [np.ones(len(o), np.int64) for o in points] if labels is None else labels
        return points, [] if labels is None else labels
    if array is None:
        return None, labels
    if array.ndim == 1 and array.size in (0, 2):
        array = array.reshape(-1, 2)
        with contextlib.suppress(ValueError, TypeError, RuntimeError):  # no numbers either
            labels = None if labels is None else np.reshape(labels, -1)
    return array, np.ones(array.shape[:-1], np.int64) if labels is None else labels


def by_object(prompts: Prompts, objects: int = 0) -> tuple[ObjectPrompts, ...]:
    """The points and boxes of each object.

    Args:
        prompts: what was asked.
        objects: how many there are at least.

    Raises:
        PromptError: the prompts are malformed.
    """
    points, boxes = read_points(prompts), read_boxes(prompts.box)
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
    found = []
    for own, box, _ in itertools.zip_longest(
        zip(*points, strict=True) if points is not None else (),
        boxes if boxes is not None else (),
        range(objects),
    ):
        coords, labels = own or nothing
        is_point = labels >= NOT_A_POINT  # others are padding
        found.append(ObjectPrompts(coords[is_point], labels[is_point], box))
    return tuple(found)
