"""`benchmarks/hardening/soak.py` in short, and that it says so where something is not flat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks.hardening import soak

from sam3rt import SegmentationModel

# It measures time and memory.
pytestmark = pytest.mark.serial


def test_a_short_run_counts_what_it_did(small_model: SegmentationModel) -> None:
    found = soak.run(small_model, predictions=60, images=6, embeddings=2)
    assert found["predictions"] == 60
    assert found["image_changes"] == 6
    assert found["embeddings_saved_and_loaded"] == 2
    assert found["resident_mb"]["most"] >= found["resident_mb"]["at_the_end"] > 100
    # Of twelve predictions one is the click; images 0 and 5 have the size that is followed.
    assert found["clicks_followed"] >= 1
    for name in ("one_click_ms", "one_click_processor_ms"):
        assert found[name]["median_of_second_half"] > 1, name


def test_images_and_prompts_have_many_shapes() -> None:
    rng = np.random.default_rng(0)
    images = [soak.picture(rng, number) for number in range(50)]
    assert {image.shape for image in images[::5]} == {(240, 320, 3)}
    assert len({image.shape for image in images}) > 35
    calls = [soak.varied_call(rng, (60, 80))["point_coords"].shape for _ in range(100)]
    assert len(set(calls)) > 60


def test_trend_is_that_of_the_samples() -> None:
    found = soak.trend([(1000 * n, 10.0 + 2 * n) for n in range(10)])
    assert found == {
        "median_of_first_half": 14.0,
        "median_of_second_half": 24.0,
        "slope_per_1000_predictions": 2.0,
    }


@pytest.mark.parametrize(
    ("growth", "second_half", "expected"),
    [
        (0.01, 20.0, []),
        (-3.0, 12.0, []),
        (1.5, 20.0, ["memory"]),
        (0.01, 23.0, ["processor time"]),
        (1.5, 23.0, ["memory", "processor time"]),
    ],
)
def test_growth_and_slowdown_are_complained_of(
    growth: float, second_half: float, expected: list[str]
) -> None:
    result: dict[str, Any] = {
        "resident_mb": {"slope_per_1000_predictions": growth},
        "one_click_processor_ms": {
            "median_of_first_half": 20.0,
            "median_of_second_half": second_half,
        },
    }
    found = soak.complaints(result)
    assert len(found) == len(expected)
    for complaint, word in zip(found, expected, strict=True):
        assert word in complaint
