"""Objects of one image or several in common runs of the decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import PADDING_LABEL
from ...masks import MaskOptions
from ...prompts import PackedPrompts
from ..base import ImageCall
from .lane import Lane
from .masking import Masks, Pictures
from .memory import Block
from .shapes import Limits, classify


class Part(NamedTuple):
    """Objects of one image in a run.

    Attributes:
        image: the image's number.
        prompts: of the objects.
    """

    image: int
    prompts: PackedPrompts


def share_runs(
    prompts: Sequence[PackedPrompts], at_once: int, limits: Limits
) -> Iterable[list[Part]]:
    """Divide several images' objects among as few runs as their sizes allow.

    An object's points are padded as if it were alone: only objects of one class of points share a
    run. All objects of a run have mask prompts, or none has.

    Args:
        prompts: of each image, of one object at least.
        at_once: objects in one run, at most.
        limits: of the engine.
    """
    runs: dict[tuple[int, bool], list[Part]] = {}
    for image, own in enumerate(prompts):
        points = own.labels.shape[1]
        kind = classify(1, points, False, limits).points, own.masks is not None
        for part in own.split(at_once):
            run = runs.setdefault(kind, [])
            if sum(len(other.prompts.labels) for other in run) + len(part.labels) > at_once:
                yield run
                run = runs[kind] = []
            run.append(Part(image, part))
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


def decode_together(
    lane: Lane,
    calls: Sequence[ImageCall],
    blocks: Sequence[Block],
    outputs: Sequence[str],
    masks: Sequence[Masks],
    options: MaskOptions,
    at_once: int,
    limits: Limits,
) -> list[list[NDArray[Any]]]:
    """Run the decoder for one image or several.

    Args:
        lane: where.
        calls: what is asked about each image.
        blocks: their feature maps.
        outputs: names of decoder outputs.
        masks: where each image's masks go, or nothing if none are to be made.
        options: how logits become masks.
        at_once: objects in one run, at most.
        limits: of the engine.

    Returns:
        For each image the outputs, float32 [1, P, ...].
    """
    parts: list[list[list[NDArray[Any]]]] = [[] for _ in calls]
    done = [0] * len(calls)
    for run in share_runs([call.prompts for call in calls], at_once, limits):
        pictures, features = [], []
        for image, prompts in run:
            count = len(prompts.labels)
            features += [blocks[image]] * count
            if masks:
                room = masks[image].part(done[image], done[image] + count)
                pictures.append(Pictures(calls[image].geometry, options, room))
            done[image] += count
        if len({image for image, _ in run}) == 1:
            features = features[:1]
        found = lane.decode(features, join([part.prompts for part in run]), outputs, pictures)
        at = 0
        for image, prompts in run:
            count = len(prompts.labels)
            parts[image].append([array[:, at : at + count] for array in found])
            at += count
    return [[_joined(pieces) for pieces in zip(*own, strict=True)] for own in parts]


def _joined(pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Outputs [1, P, ...] of several runs as those of one; of one run, the usual case, as it is."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
