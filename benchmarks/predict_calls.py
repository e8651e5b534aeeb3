"""The calls of ``predict`` that are timed, and how they are timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sam3rt_bench.timing import Effort, alternate

HEIGHT, WIDTH = 1080, 1920
PROMPTS: dict[str, dict[str, Any]] = {
    "one click": {"point_coords": [[900.0, 500.0]], "point_labels": [1]},
    "one click, single mask": {
        "point_coords": [[900.0, 500.0]],
        "point_labels": [1],
        "multimask_output": False,
    },
    "one box": {"box": [500.0, 200.0, 1500.0, 900.0], "multimask_output": False},
    "five clicks": {
        "point_coords": [[900.0, 500.0], [300.0, 200.0], [1500, 800], [60, 900], [1000, 100]],
        "point_labels": [1, 0, 1, 0, 1],
    },
    "four boxes": {
        "box": [
            [500.0, 200.0, 1500.0, 900.0],
            [100.0, 100.0, 700.0, 600.0],
            [900.0, 300.0, 1900.0, 1000.0],
            [300.0, 300.0, 600.0, 500.0],
        ],
        "multimask_output": False,
    },
}


def measure(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, dict[str, float]]:
    """Call each in turn, ``repetitions`` times; milliseconds."""
    times = alternate(calls, Effort(repetitions, float("inf"), 3))
    return {
        name: {"median_ms": t.median_ms, "p95_ms": t.p95_ms, "min_ms": t.min_ms}
        for name, t in times.items()
    }
