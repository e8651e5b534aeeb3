"""Prompts as people write them, object by object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .prompts import Prompts


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
        points: one (x, y), or what ``Prompts`` takes.
        labels: one label for one point, what ``Prompts`` takes, or ``None`` for 1 everywhere.
    """
    try:
        array = np.asarray(points)
    except ValueError:  # objects with different numbers of points
        return points, [
            np.ones(len(some), np.int64) for some in points
        ] if labels is None else labels
    except (TypeError, RuntimeError):  # no numbers: what checks points says so
        return points, [] if labels is None else labels
    if array.ndim == 1:
        array = array.reshape(-1, 2) if array.size in (0, 2) else array
        labels = None if labels is None else np.reshape(labels, -1)
    return array, np.ones(array.shape[:-1], np.int64) if labels is None else labels


def by_object(prompts: Prompts, objects: int) -> tuple[ObjectPrompts, ...]:
    """The points and boxes of prompts that have been checked, for each object."""
    points: Any = prompts.point_coords
    labels: Any = prompts.point_labels
    if points is None:
        points, labels = [np.zeros((0, 2))] * objects, [np.zeros(0)] * objects
    elif np.ndim(points[0] if len(points) else [0]) < 2:
        points, labels = [points], [labels]
    boxes: Any = [None] * objects
    if prompts.box is not None:
        boxes = np.reshape(np.asarray(prompts.box, np.float32), (-1, 4))
    return tuple(
        ObjectPrompts(
            np.reshape(np.asarray(p, np.float32), (-1, 2)), np.asarray(own, np.int64), box
        )
        for p, own, box in zip(points, labels, boxes, strict=True)
    )
