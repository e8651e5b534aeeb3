"""How far apart two results are, as figures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Measurement:
    """One comparison with the record.

    Attributes:
        case: the image or case it is about.
        output: which of the outputs.
        metric: what was measured.
        value: the figure; NaN where outputs hold NaN.
        limit: the figure allowed.
        at_least: whether the figure must reach the limit rather than stay below it.
    """

    case: str
    output: str
    metric: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def subject(self) -> str:
        """The case and the output in words."""
        return f"{self.case} {self.output}"

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def badness(self) -> float:
        """Grows as the figure gets worse; infinite for NaN. Compares one metric's figures."""
        if math.isnan(self.value):
            return math.inf
        return -self.value if self.at_least else self.value


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference over the largest absolute expected value.

    NaN where either holds one, infinity where the shapes differ.
    """
    return largest_error(actual, expected) / max(float(np.abs(expected).max()), 1e-6)


def largest_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference; NaN where either holds one, infinity where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max())


def cosine(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Cosine similarity of all values; NaN where either holds one or the shapes differ.

    Zeros agree with zeros only.
    """
    if actual.shape != expected.shape:
        return float("nan")
    a, b = actual.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def mask_ious(logits: NDArray[np.float32], expected: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The IoU of each mask, [P, C]; two empty masks agree. NaN where a logit is NaN."""
    actual = logits > 0
    both = (actual & expected).sum(axis=(-2, -1))
    either = (actual | expected).sum(axis=(-2, -1))
    ious = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    broken: NDArray[np.float64] = np.where(np.isnan(logits).any(axis=(-2, -1)), np.nan, ious)
    return broken
