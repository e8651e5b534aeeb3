"""Shape classes: the few sizes that decoder calls are padded to.

A CUDA graph is recorded for one size, and TensorRT spends time whenever sizes change. So calls
are padded to few sizes, which a warm-up records. Padding points carry a label that the decoder
excludes from every attention, and padding objects are independent of the others: neither changes a
result.
"""

from __future__ import annotations

from typing import NamedTuple

# And four times the last for more.
OBJECTS = (1, 4, 16)
POINTS = (4, 8, 32)


class ShapeClass(NamedTuple):
    """The sizes of one decoder call.

    Attributes:
        objects: P.
        points: N, per object.
        masks: M: 1, or P where each object has a mask prompt of its own.
        images: 1, or P where each object has an image of its own.
    """

    objects: int
    points: int
    masks: int
    images: int = 1


class Limits(NamedTuple):
    """The greatest sizes that a decoder engine takes.

    Attributes:
        objects: P.
        points: N.
    """

    objects: int
    points: int


def classify(
    objects: int, points: int, own_masks: bool, limits: Limits, *, own_images: bool = False
) -> ShapeClass:
    """The class of a call.

    Args:
        objects: at most what the limits allow.
        points: per object, at most what the limits allow; may be 0.
        own_masks: whether each object has a mask prompt of its own.
        limits: of the engine.
        own_images: whether each object has an image of its own.
    """
    padded = _padded(objects, OBJECTS, limits.objects)
    return ShapeClass(
        padded,
        _padded(points, POINTS, limits.points),
        padded if own_masks else 1,
        padded if own_images else 1,
    )


def usual_classes(limits: Limits) -> tuple[ShapeClass, ...]:
    """The classes of all calls on one image without mask prompts: 16 objects, 32 points."""
    objects = sorted({min(count, limits.objects) for count in OBJECTS})
    points = sorted({min(count, limits.points) for count in POINTS})
    return tuple(ShapeClass(p, n, 1) for p in objects for n in points)


def _padded(count: int, sizes: tuple[int, ...], limit: int) -> int:
    for size in sizes:
        if count <= size:
            return min(size, limit)
    size = sizes[-1]
    while size < count:
        size *= 4
    return min(size, limit)
