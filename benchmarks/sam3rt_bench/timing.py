"""Repeated calls, timed in turn."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .document import Times

Call = Callable[[], Any]
# Seconds. Threads of GNU's OpenMP, which PyTorch uses, spin for some milliseconds.
_PAUSE = 0.05
# Seconds that may pass without a word.
_SILENCE = 30


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repetitions: rounds at most.
        seconds: time after which no further round of one table begins, once there are the fewest.
        warm_up: untimed rounds at most; one where a round takes a second or more.
        fewest: rounds at least; fewer than three say nothing about spread.
    """

    repetitions: int
    seconds: float
    warm_up: int
    fewest: int = 3

    def rounds_for(self, one_round: float) -> int:
        """About how many rounds a table has whose calls in turn take so many seconds."""
        wanted = max(self.fewest, 1 + int(self.seconds / max(one_round, 1e-3)))
        return min(self.repetitions, wanted)

    def seconds_for(self, one_round: float) -> float:
        """About how long that table takes."""
        warm_up = min(self.warm_up, 1) if one_round >= 1 else self.warm_up
        return (self.rounds_for(one_round) + warm_up) * one_round


def summarize(seconds: Sequence[float]) -> Times:
    """Statistics of durations given in seconds."""
    values = 1e3 * np.asarray(seconds, np.float64)
    q25, median, q75, p95, p99 = np.percentile(values, (25, 50, 75, 95, 99))
    return Times(
        count=len(values),
        median_ms=_round(median),
        mean_ms=_round(values.mean()),
        p95_ms=_round(p95),
        p99_ms=_round(p99),
        min_ms=_round(values.min()),
        max_ms=_round(values.max()),
        spread=_round((q75 - q25) / max(median, 1e-9)),
    )


def alternate(
    calls: Mapping[str, Call], effort: Effort, progress: Callable[[str], None] | None = None
) -> dict[str, Times]:
    """Time calls in turn, so that a machine that gets slower or faster does so for all of them.

    Every round has another order, the same in every run, so that none always follows the same one;
    and between two of them there is a pause, in which the threads of the one before, which some
    libraries let spin for a while in wait of more work, come to rest.

    Args:
        calls: what to time, by name.
        effort: how often.
        progress: told after the first round how long the others take, where that is long.

    Returns:
        The durations of each.
    """
    names = list(calls)
    chance = random.Random(0)
    pause = _PAUSE if len(names) > 1 else 0.0
    for _ in range(effort.warm_up):
        start = time.perf_counter()
        for name in names:
            calls[name]()
        if time.perf_counter() - start >= 1:
            break
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    begin = time.perf_counter()
    for number in range(effort.repetitions):
        if number >= effort.fewest and time.perf_counter() - begin > effort.seconds:
            break
        for name in chance.sample(names, len(names)):
            call = calls[name]
            time.sleep(pause)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        if number == 0 and progress is not None:
            one_round = time.perf_counter() - begin
            rest = (effort.rounds_for(one_round) - 1) * one_round
            if rest >= _SILENCE:
                minutes = rest >= 100
                progress(
                    f"  about {rest / 60:.0f} min more" if minutes else f"  about {rest:.0f} s more"
                )
    return {name: summarize(values) for name, values in seconds.items()}


def timed(call: Call) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def fastest(call: Call, runs: int = 5) -> float:
    """Seconds of the fastest of several calls, after two that warm up."""
    return min([timed(call)[0] for _ in range(runs + 2)][2:])


def _round(value: Any) -> float:
    """Five significant digits: more would be noise."""
    return float(f"{float(value):.5g}")
