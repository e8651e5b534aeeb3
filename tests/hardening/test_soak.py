"""`benchmarks/hardening/soak.py` in short, and that it says so where something is not flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.hardening import soak
from tests.support.runnable_bundle import runnable_bundle

from sam3rt import load_model

# It measures time and memory.
pytestmark = pytest.mark.serial


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_short_run_counts_what_it_did(backend: str, tmp_path: Path) -> None:
    path = runnable_bundle(tmp_path / "toy").path
    model = load_model(path, backend=backend, device="cpu", precision="fp32")
    found = soak.run(model, predictions=240, images=12, embeddings=2)
    assert found["predictions"] == 240
    assert found["image_changes"] == 12
    assert found["embeddings_saved_and_loaded"] == 2
    assert found["resident_mb"]["most"] >= found["resident_mb"]["at_the_end"] > 50
    # Every twelfth prediction is the click. Images 0, 5 and 10 have the size that is followed, and
    # twenty predictions each; the first tenth of all is warm-up.
    assert 3 <= found["clicks_followed"] <= 4
    for name in ("one_click_ms", "one_click_processor_ms"):
        assert found[name]["median_of_second_half"] > 0, name


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
