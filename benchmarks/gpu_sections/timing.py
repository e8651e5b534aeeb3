"""Times of calls, and what a GPU's own clock says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Times = dict[str, float]


def times(call: Callable[[], Any], seconds: float, *, most: int = 200) -> Times:
    """Median, 95th percentile and count of a call that waits for its own end, in milliseconds.

    Args:
        call: what is timed, after two calls that are not.
        seconds: after which no further call is made, once there are three.
        most: calls at most.
    """
    for _ in range(2):
        call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < most and (len(taken) < 3 or time.perf_counter() < end):
        begun = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - begun))
    return summary(taken)


def device_times(call: Callable[[], Any], device: str, count: int = 20) -> Times:
    """The same of work that a call queues, by the GPU's own clock; on the CPU by the host's."""
    if device == "cpu":
        return times(call, 0.2, most=count)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    taken = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return summary(taken)


def summary(taken: list[float]) -> Times:
    """Statistics of durations in milliseconds."""
    median, p95 = np.percentile(taken, (50, 95))
    return {"median_ms": float(median), "p95_ms": float(p95), "count": len(taken)}
