"""How far each candidate's results are from FP32's: speed with wrong masks is no speed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .candidates import Candidate
from .document import AgreementRow
from .scene import requests


@dataclass
class _Answers:
    maps: list[NDArray[np.float32]]
    multi: list[NDArray[np.bool_]] = field(default_factory=list)
    single: list[NDArray[np.bool_]] = field(default_factory=list)


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
        multi = _ious(said.multi, expected.multi)
        single = _ious(said.single, expected.single)
        rows.append(
            AgreementRow(
                candidate=candidate.name,
                reference=reference.name,
                feature_cosine=min(map(_cosine, said.maps, expected.maps)),
                masks=len(multi),
                mean_iou=float(multi.mean()),
                least_iou=float(multi.min()),
                single_masks=len(single),
                single_least_iou=float(single.min()),
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
            masks += list(logits.reshape(-1, *logits.shape[-2:]) > 0)
    return answers


def _ious(
    actual: list[NDArray[np.bool_]], expected: list[NDArray[np.bool_]]
) -> NDArray[np.float64]:
    ious = []
    for a, b in zip(actual, expected, strict=True):
        either = int((a | b).sum())
        ious.append(int((a & b).sum()) / either if either else 1.0)
    return np.array(ious)


def _cosine(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    a, b = actual.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return min(float(a @ b) / max(norms, 1e-30), 1.0)
