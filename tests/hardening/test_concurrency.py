"""`benchmarks/hardening/concurrency.py` in short: many threads over one model, bit for bit."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from benchmarks.hardening import concurrency

from sam3rt import SegmentationModel
from sam3rt.prompts import PackedPrompts

# Threads need the machine's cores.
pytestmark = pytest.mark.serial


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "count", "calls_per_image"),
    [("tiny_model", 16, 800, 5), ("toy_model", 16, 800, 5), ("default_model", 8, 32, 4)],
)
def test_many_threads_get_what_one_gets(
    name: str, workers: int, count: int, calls_per_image: int, request: pytest.FixtureRequest
) -> None:
    """Small models meet more often, the bundled one takes the kernels and memory of users."""
    found = concurrency.compare(request.getfixturevalue(name), workers, count, calls_per_image)
    assert found["predictions"] == count
    assert found["image_changes"] == count // calls_per_image
    assert found["results_that_differ"] == 0


def test_results_of_another_thread_are_noticed(
    tiny_model: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend whose threads share one buffer, as a broken one might."""
    original = tiny_model.backend.decode
    main = threading.get_ident()

    def shared(features: Any, prompts: PackedPrompts, outputs: Any) -> Any:
        found = original(features, prompts, outputs)
        if threading.get_ident() != main:
            found[0].flat[0] = np.nextafter(found[0].flat[0], np.float32(np.inf))
        return found

    monkeypatch.setattr(tiny_model.backend, "decode", shared)
    found = concurrency.compare(tiny_model, workers=2, count=4, calls_per_image=4)
    assert found["results_that_differ"] == 4
