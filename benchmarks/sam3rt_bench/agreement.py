"""How far each candidate's results are from FP32's: speed with wrong masks is no speed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sam3rt.accuracy.metrics import cosine, mask_ious

from .candidates import Candidate
from .document import AgreementRow
from .scene import requests


@dataclass
class _Answers:
    maps: list[NDArray[np.float32]]
    multi: list[NDArray[np.float32]] = field(default_factory=list)
    single: list[NDArray[np.float32]] = field(default_factory=list)


def pick_reference(candidates: list[Candidate]) -> Candidate | None:
    """The candidate that counts as right: PyTorch in FP32, or else a backend in FP32."""
    exact = [c for c in candidates if c.model.backend.precision == "fp32"]
    exact.sort(key=lambda c: (c.model.backend.name != "pytorch", c.model.backend.name))
    return exact[0] if exact else None


def compare_masks(
    candidates: list[Candidate], reference: Candidate, image: NDArray[np.uint8]
) -> list[AgreementRow]:
    """Masks of every candidate against the reference's, at low resolution, holes unfilled."""
    expected = _answers(reference, image)
    rows = []
    for candidate in candidates:
        said = expected if candidate is reference else _answers(candidate, image)
        multi, single = (
            mask_ious(np.concatenate(ours), np.concatenate(theirs) > 0)
            for ours, theirs in ((said.multi, expected.multi), (said.single, expected.single))
        )
        rows.append(
            AgreementRow(
                candidate=candidate.name,
                reference=reference.name,
                feature_cosine=_least(*map(cosine, said.maps, expected.maps)),
                masks=len(multi),
                mean_iou=float(np.nan_to_num(multi).mean()),
                least_iou=_least(*multi),
                single_masks=len(single),
                single_least_iou=_least(*single),
            )
        )
    return rows


def _answers(candidate: Candidate, image: NDArray[np.uint8]) -> _Answers:
    embedding = candidate.model.encode(image)
    answers = _Answers(list(embedding.features.numpy()))
    for request in requests(embedding.original_size):
        for multimask, masks in ((True, answers.multi), (False, answers.single)):
            decoded = candidate.model.decode(embedding, request.prompts, multimask)
            logits = decoded.low_res_masks
            masks.append(logits.reshape(-1, *logits.shape[-2:]))
    return answers


def _least(*values: float) -> float:
    """The least; a value that is not a number counts as 0, since JSON has no word for it."""
    return float(np.nan_to_num(values).min())
