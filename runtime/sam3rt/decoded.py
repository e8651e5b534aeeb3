"""What a decoder call says, and how it becomes a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .object_prompts import ObjectPrompts
from .overlay import ScoreUnit
from .results import PER_MASK, Segmentation


@dataclass(frozen=True, repr=False)
class DecodedMasks:
    """What the decoder says of P objects.

    Attributes:
        low_res_masks: float32 [P, C, h, w], unclamped logits; C is 1 in a single-mask call.
        iou_predictions: float32 [P, C], the predicted IoU of each mask.
        object_score_logits: float32 [P], positive where the model sees an object; ``None`` for
            models without that head.
    """

    low_res_masks: NDArray[np.float32]
    iou_predictions: NDArray[np.float32]
    object_score_logits: NDArray[np.float32] | None

    def __repr__(self) -> str:
        objects, masks, height, width = self.low_res_masks.shape
        return f"<DecodedMasks: {objects} x {masks} masks of {width} x {height} logits>"


def arrange(
    masks: NDArray[np.bool_],
    scores: NDArray[np.float32],
    low_res_masks: NDArray[np.float32],
    object_score_logits: NDArray[np.float32] | None,
    *,
    score_unit: ScoreUnit,
    image: NDArray[np.uint8] | None,
    prompts: tuple[ObjectPrompts, ...],
) -> Segmentation:
    """The result of a decoder call.

    Args:
        masks: bool [B, C, H, W].
        scores: float32 [B, C].
        low_res_masks: float32 [B, C, h, w].
        object_score_logits: float32 [B] or ``None``.
        score_unit: of the scores.
        image: uint8 [H, W, 3] or ``None``.
        prompts: of each object.
    """
    count = scores.shape[1]
    objects = np.repeat(np.arange(len(scores)), count)
    order = np.argsort(-scores, axis=1, kind="stable").ravel()
    where = (objects, order)
    return Segmentation(
        masks[where],
        (masks.shape[2], masks.shape[3]),
        scores[where],
        objects,
        score_unit,
        image,
        prompts,
        low_res_masks[where],
        None if object_score_logits is None else object_score_logits[objects],
    )


def joined(parts: Sequence[Segmentation]) -> Segmentation:
    """Results of objects of one image as one result, objects numbered on.

    Args:
        parts: at least one, of calls on one image by one model.
    """
    offsets = np.cumsum([0] + [len(part.prompts) for part in parts[:-1]])
    arrays: dict[str, Any] = {
        name: [getattr(part, name) for part in parts] for name in ("encoded", *PER_MASK)
    }
    arrays["objects"] = [part.objects + o for part, o in zip(parts, offsets, strict=True)]
    whole: dict[str, Any] = {n: np.concatenate(a) for n, a in arrays.items() if a[0] is not None}
    return replace(
        parts[0], prompts=tuple(prompts for part in parts for prompts in part.prompts), **whole
    )
