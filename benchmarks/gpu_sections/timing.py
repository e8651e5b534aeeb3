"""Times of calls, and what a GPU's own clock says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sam3rt_bench.document import Times
from sam3rt_bench.timing import Effort, alternate, summarize


def times(call: Callable[[], Any], seconds: float, *, most: int = 200) -> dict[str, float]:
    """Median, 95th percentile and count of a call that waits for its own end, in milliseconds.

    Args:
        call: what is timed, after two calls that are not.
        seconds: after which no further call is made, once there are three.
        most: calls at most.
    """
    return _in_short(alternate({"call": call}, Effort(most, seconds, 2))["call"])


def device_times(call: Callable[[], Any], device: str, count: int = 20) -> dict[str, float]:
    """The same of work that a call queues, by the GPU's own clock; on the CPU by the host's."""
    if device == "cpu":
        return times(call, 0.2, most=count)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return _in_short(summarize(seconds))


def _in_short(found: Times) -> dict[str, float]:
    return {"median_ms": found.median_ms, "p95_ms": found.p95_ms, "count": found.count}
