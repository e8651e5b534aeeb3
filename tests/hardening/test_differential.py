"""`benchmarks/hardening/differential.py` in short, and how it tells a tie from a difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.hardening import differential
from benchmarks.hardening.differential import Prediction, differences, is_tie
from numpy.typing import NDArray


@pytest.mark.slow
def test_random_cases_agree_with_pytorch(tiny_export: Path, tiny_sam3: Path) -> None:
    checkpoint = tiny_export / "sam3_tiny.pt"
    found = differential.compare(tiny_sam3, checkpoint, cases=240, images=12, seed=11)
    assert found["cases"] == 240
    assert found["disagreements"] == []
    assert found["worst_of_those_that_agree"]["logits"] > 0


def masks(count: int, seed: int) -> NDArray[np.float32]:
    """Stable masks: logits far from zero, [count, 16, 16]."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((count, 16, 16)) < 0.5, -6, 6).astype(np.float32)


def prediction(low_res: NDArray[np.float32], iou: list[float]) -> Prediction:
    """One object's, at twice the size."""
    large = low_res.repeat(2, axis=1).repeat(2, axis=2)
    return large, np.array(iou, np.float32), low_res


THREE = masks(3, seed=0)
# 60 pixels of foreground: two more between -0.05 and +0.05 make its stability 60/62, below 0.98.
UNSTABLE = np.full((1, 16, 16), -6, np.float32)
UNSTABLE[0, :6, :10] = 6


def test_equal_predictions_do_not_differ() -> None:
    errors, tied = differences(
        prediction(THREE, [0.1, 0.2, 0.3]), prediction(THREE, [0.1, 0.2, 0.3])
    )
    assert errors == {"logits": 0, "iou": 0, "mask_pixels": 0}
    assert tied == 0


@pytest.mark.parametrize(("logit", "tied"), [(0.004, 4), (0.006, 0)])
def test_a_pixel_is_tied_within_the_tolerance_of_logits(logit: float, tied: int) -> None:
    theirs = THREE.copy()
    theirs[1, 3, 3] = logit
    ours = theirs.copy()
    ours[1, 3, 3] = -1e-6
    errors, counted = differences(*(prediction(x, [0.1, 0.2, 0.3]) for x in (ours, theirs)))
    assert counted == tied
    assert (errors["mask_pixels"] == 0) == (tied > 0)


def test_results_of_other_shapes_differ() -> None:
    errors, _ = differences(prediction(THREE, [0.1] * 3), prediction(THREE[:1], [0.1]))
    assert all(not errors[name] <= differential.LIMITS[name] for name in errors)


@pytest.mark.parametrize(
    ("scores", "tie"),
    [([0.9, 0.9005, 0.1], True), ([0.9, 0.92, 0.1], False), ([0.5, 0.5, 0.9], False)],
)
def test_two_masks_of_nearly_equal_scores_are_a_tie(scores: list[float], tie: bool) -> None:
    ours, theirs = prediction(THREE[:1], scores[:1]), prediction(THREE[1:2], scores[1:2])
    assert is_tie(ours, theirs, prediction(THREE, scores)) is tie


# Two pixels just below +0.05, clearly between the two limits, and clearly over both.
@pytest.mark.parametrize(
    ("pixels", "tie"), [([0.048, 0.048], True), ([0.0, 0.0], False), ([3.0, 3.0], False)]
)
def test_the_first_mask_is_tied_where_its_stability_is(pixels: list[float], tie: bool) -> None:
    first = UNSTABLE.copy()
    first[0, 8, :2] = pixels
    ours, theirs = prediction(first, [0.8]), prediction(THREE[2:], [0.9])
    assert is_tie(ours, theirs, prediction(THREE, [0.2, 0.3, 0.9])) is tie


def test_the_first_mask_against_one_that_is_not_the_best_is_no_tie() -> None:
    first = UNSTABLE.copy()
    first[0, 8, :2] = 0.048
    ours, theirs = prediction(first, [0.8]), prediction(THREE[:1], [0.2])
    assert not is_tie(ours, theirs, prediction(THREE, [0.2, 0.3, 0.9]))


def test_two_first_masks_that_differ_are_no_tie() -> None:
    ours, theirs = prediction(masks(1, 5), [0.8]), prediction(masks(1, 6), [0.8])
    assert not is_tie(ours, theirs, prediction(THREE, [0.2, 0.3, 0.9]))


def test_every_object_must_be_tied() -> None:
    def both(first: NDArray[np.float32], second: NDArray[np.float32]) -> Prediction:
        low_res = np.stack([first, second])
        return low_res, np.zeros((2, len(first)), np.float32), low_res

    scores = np.array([[0.9, 0.9005, 0.1], [0.9, 0.5, 0.1]], np.float32)
    candidates = (np.stack([THREE, THREE]), scores, np.stack([THREE, THREE]))
    same = both(THREE[:1], THREE[:1])
    assert is_tie(same, both(THREE[1:2], THREE[:1]), candidates)
    assert not is_tie(same, both(THREE[:1], THREE[1:2]), candidates)
