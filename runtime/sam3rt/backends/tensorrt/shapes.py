"""Shape classes: the few sizes that decoder calls are padded to.

A CUDA graph is recorded for one size, and TensorRT spends time whenever sizes change. So calls
are padded to powers of two. Padding points carry a label that the decoder excludes from every
attention, and padding objects are independent of the others: neither changes a result.
"""

from __future__ import annotations

from typing import NamedTuple

_FEWEST_POINTS = 4


class ShapeClass(NamedTuple):
    """The sizes of one decoder call.

    Attributes:
        objects: P.
        points: N, per object.
        masks: M: 1, or P where each object has a mask prompt of its own.
    """

    objects: int
    points: int
    masks: int


class Limits(NamedTuple):
    """The greatest sizes that a decoder engine takes.

    Attributes:
        objects: P.
        points: N.
    """

    objects: int
    points: int


def classify(objects: int, points: int, own_masks: bool, limits: Limits) -> ShapeClass:
    """The class of a call.

    Args:
        objects: at most what the limits allow.
        points: per object, at most what the limits allow; may be 0.
        own_masks: whether each object has a mask prompt of its own.
        limits: of the engine.
    """
    padded = min(_power_of_two(objects), limits.objects)
    return ShapeClass(
        padded,
        min(_power_of_two(max(points, _FEWEST_POINTS)), limits.points),
        padded if own_masks else 1,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
