"""How calls become runs of the decoder: of few sizes, with objects of one image or several.

A CUDA graph is recorded for one size, and TensorRT spends time whenever sizes change. So calls
are padded to few sizes, which a warm-up records. Padding points carry a label that the decoder
excludes from every attention, and padding objects are independent of the others: neither changes a
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import PADDING_LABEL
from ...prompts import PackedPrompts
from .imaging import Picture
from .memory import Block

# And four times the last for more.
OBJECTS = (1, 4, 16)
POINTS = (4, 8, 32)
# Bytes of masks that are made at once; more objects take several turns.
_MOST_MASKS = 128 << 20


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


class Part(NamedTuple):
    """Objects of one image in a run.

    Attributes:
        block: the image's feature maps.
        prompts: of P objects.
        results: where outputs go, float32 [1, P, ...] each; the first are the mask logits.
        picture: the masks to make, or ``None``.
        is_pinned: whether the GPU can write to the first of the results.
    """

    block: Block
    prompts: PackedPrompts
    results: list[NDArray[np.float32]]
    picture: Picture | None = None
    is_pinned: bool = False

    @property
    def objects(self) -> int:
        """How many there are."""
        return len(self.prompts.labels)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks to make."""
        return 0 if self.picture is None else self.picture.masks.nbytes

    def split(self, at_once: int) -> Iterator[Part]:
        """The same in parts of at most so many objects."""
        for number, prompts in enumerate(self.prompts.split(at_once)):
            own = slice(number * at_once, (number + 1) * at_once)
            results = [result[:, own] for result in self.results]
            picture = None if self.picture is None else self.picture.part(own)
            yield Part(self.block, prompts, results, picture, self.is_pinned)


def share_runs(images: Sequence[Part], limits: Limits, *, joins: bool) -> Iterator[list[Part]]:
    """Divide images' objects among as few runs as their sizes allow.

    No run makes masks of more bytes than are made at once. An object's points are padded as if it
    were alone: only objects of one class of points share a run. All objects of a run have mask
    prompts, or none has.

    Args:
        images: all of each image's objects.
        limits: of the engine.
        joins: whether several images may share a run.
    """
    runs: dict[tuple[int, int, bool], list[Part]] = {}
    for number, image in enumerate(images):
        if not image.objects:
            continue
        points = classify(1, image.prompts.labels.shape[1], False, limits).points
        kind = 0 if joins else number, points, image.prompts.masks is not None
        each = max(1, image.mask_bytes // image.objects)
        for part in image.split(min(limits.objects, max(1, _MOST_MASKS // each))):
            run = runs.setdefault(kind, [])
            grown = [*run, part]
            if run and (
                sum(other.objects for other in grown) > limits.objects
                or sum(other.mask_bytes for other in grown) > _MOST_MASKS
            ):
                yield run
                grown = [part]
            runs[kind] = grown
    yield from runs.values()


def join(parts: Sequence[PackedPrompts]) -> PackedPrompts:
    """Prompts of several images as those of one call, object by object.

    Objects with fewer points than others are padded with points that do not count.

    Args:
        parts: at least one; all with mask prompts, or none.
    """
    if len(parts) == 1:
        return parts[0]
    objects = sum(len(part.labels) for part in parts)
    most = max(part.labels.shape[1] for part in parts)
    points = np.zeros((objects, most, 2), np.float32)
    labels = np.full((objects, most), PADDING_LABEL, np.int64)
    masks, at = [], 0
    for part in parts:
        count, own = part.labels.shape
        points[at : at + count, :own] = part.points
        labels[at : at + count, :own] = part.labels
        if part.masks is not None:
            masks.append(np.broadcast_to(part.masks, (count, *part.masks.shape[1:])))
        at += count
    return PackedPrompts(points, labels, np.concatenate(masks) if masks else None)
