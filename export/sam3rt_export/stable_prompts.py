"""Parity cases in which the choice of the single mask is stable.

A single-mask call chooses a mask: by a stability score against a threshold, then by the largest
predicted IoU. Near a tie, rounding alone changes the choice, and a record of such a case would
refuse good engines at random. So the prompts of a case are moved until its choice has a margin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam3rt.accuracy.record import ParityCase

from .graphs.sam_decoder import SamDecoderGraph

# Shares of the image by which the prompts are moved, tried in turn.
SHIFTS = (
    (0.0, 0.0),
    (0.03, 0.0),
    (-0.03, 0.0),
    (0.0, 0.03),
    (0.0, -0.03),
)
# About fifteen times what FP16 moves predicted IoUs of the published size (0.0005), and well above
# what it moves stability scores.
_IOU_MARGIN = 0.008
_STABILITY_MARGIN = 0.005


@torch.no_grad()
def most_decided(
    decoder: SamDecoderGraph, features: tuple[Tensor, ...], candidates: Sequence[ParityCase]
) -> ParityCase:
    """The first candidate whose single masks have their margins, or the one nearest to that.

    Args:
        decoder: the graph; it shows its scores, and what it decodes the reference confirms.
        features: of the candidates' image, finest first, float32 [1, C, h, w] each.
        candidates: one case in several places.
    """
    best: tuple[float, ParityCase] | None = None
    for case in candidates:
        margin = _margin(decoder, features, case)
        if best is None or margin > best[0]:
            best = (margin, case)
        if margin >= 1.0:
            break
    if best is None:
        raise ValueError("there is no candidate")
    return best[1]


def _margin(decoder: SamDecoderGraph, features: tuple[Tensor, ...], case: ParityCase) -> float:
    """How far the least decided object is from another mask; 1 is far enough."""
    rule = decoder.single_mask
    if rule.always_first:
        return 1.0
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        seen.append(arguments)

    hook = rule.register_forward_pre_hook(note)
    try:
        side = 4 * decoder.architecture.grid
        given = case.prompts.masks
        masks = torch.zeros(1, side, side) if given is None else torch.from_numpy(given)
        decoder(
            features,
            torch.from_numpy(case.prompts.points)[None],
            torch.from_numpy(case.prompts.labels)[None],
            masks[None],
            torch.tensor([float(given is not None)]),
        )
    finally:
        hook.remove()
    ((logits, iou),) = seen
    score = rule.stability(logits[:, :1])[:, 0]
    stability = (score - rule.threshold).abs() / _STABILITY_MARGIN
    if decoder.architecture.predicts_log_odds:  # the margin is meant for IoUs
        iou = torch.sigmoid(iou)
    first, second = iou[:, 1:].topk(2, dim=1).values.unbind(1)
    between = torch.minimum(stability, (first - second) / _IOU_MARGIN)
    return float(torch.where(score >= rule.threshold, stability, between).min())
