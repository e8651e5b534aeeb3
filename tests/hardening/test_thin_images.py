"""`benchmarks/hardening/thin_images.py`: an ordinary image runs; what is too much is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.hardening import thin_images

ORDINARY = {"set_image_seconds": 0.5, "predict_seconds": 0.1, "peak_mb": 500.0}


def test_a_short_one_in_a_process_of_its_own() -> None:
    found = thin_images.observe(1, 40)
    assert found["set_image_seconds"] > 0
    assert found["peak_mb"] > 100


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"set_image_seconds": 1.0}, True),
        ({"predict_seconds": 2.0}, False),
        ({"peak_mb": 1100.0}, False),
        ({"refused": "image: got 1x1000000"}, True),
        ({"failed": "took over 120 s"}, False),
    ],
)
def test_what_passes(change: dict[str, Any], passes: bool) -> None:
    assert thin_images.passes(ORDINARY | change, ORDINARY) is passes
