"""The queue: order, bounds, deadlines, cancellation, and sharing that slows nobody down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from sam3rt_serve.errors import BusyError, DeadlineError
from sam3rt_serve.work import WorkQueue

LATER = 1e9

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class Held:
    """A queue whose threads wait until the test lets them go on."""

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]], **options: Any) -> None:
        self.gate = threading.Event()
        self.batches: list[list[Any]] = []
        self.started = threading.Semaphore(0)

        def held(requests: Sequence[Any]) -> Sequence[Any]:
            self.batches.append(list(requests))
            self.started.release()
            assert self.gate.wait(10)
            return answer(requests)

        defaults = {"threads": 1, "most_waiting": 100, "most_together": 8}
        self.queue: WorkQueue[Any, Any] = WorkQueue(held, "test", **(defaults | options))

    def occupy(self, threads: int = 1) -> list[Future[Any]]:
        """Keep all threads busy."""
        futures = [self.queue.submit(("busy", n), LATER) for n in range(threads)]
        for _ in futures:
            assert self.started.acquire(timeout=10)
        self.batches.clear()
        return futures

    def go(self) -> None:
        self.gate.set()
        self.queue.close()


def same(requests: Sequence[Any]) -> Sequence[Any]:
    return requests


def test_requests_are_answered_in_order() -> None:
    held = Held(same)
    held.occupy()
    futures = [held.queue.submit(n, LATER) for n in range(5)]
    assert held.queue.waiting == 5
    held.go()
    assert [future.result(0) for future in futures] == list(range(5))
    assert held.batches == [[0], [1], [2], [3], [4]]


def test_those_of_a_kind_go_together_up_to_a_size() -> None:
    held = Held(same)
    held.occupy()
    for n, (kind, size) in enumerate([("a", 3), ("b", 1), ("a", 4), ("a", 2), ("b", 1), ("a", 1)]):
        held.queue.submit(n, LATER, kind=kind, size=size)
    held.go()
    # Number 3 does not fit with 0 and 2, and nobody overtakes it on the way.
    assert held.batches == [[0, 2], [1, 4], [3, 5]]


def test_what_other_threads_could_do_at_once_is_left_to_them() -> None:
    held = Held(same, threads=3)
    with held.queue._changed:  # nobody takes anything while the requests arrive
        for n in range(7):
            held.queue.submit(n, LATER, kind="a")
    for _ in range(3):
        assert held.started.acquire(timeout=10)
    held.go()
    assert held.batches == [[0, 1, 2], [3, 4], [5, 6]]


def test_a_thread_that_is_free_alone_takes_all() -> None:
    held = Held(same, threads=2)
    held.occupy(2)
    for n in range(6):
        held.queue.submit(n, LATER, kind="a")
    with held.queue._changed:
        held.queue._free = 1
        assert [job.request for job in held.queue._take()] == list(range(6))
    held.go()


def test_more_than_may_wait_are_refused() -> None:
    held = Held(same, most_waiting=2)
    held.occupy()
    futures = [held.queue.submit(n, LATER) for n in range(2)]
    with pytest.raises(BusyError, match="2 requests"):
        held.queue.submit(2, LATER)
    futures[0].cancel()  # who has gone makes room
    futures.append(held.queue.submit(3, LATER))
    held.go()
    assert [futures[n].result(0) for n in (1, 2)] == [1, 3]
    with pytest.raises(CancelledError):
        futures[0].result(0)


def test_who_waits_too_long_gets_no_turn() -> None:
    held = Held(same)
    held.occupy()
    late = held.queue.submit("late", time.monotonic() - 1)
    in_time = held.queue.submit("in time", LATER)
    held.go()
    with pytest.raises(DeadlineError):
        late.result(0)
    assert in_time.result(0) == "in time"
    assert held.batches == [["in time"]]


def test_the_late_and_the_gone_are_not_taken_along() -> None:
    held = Held(same)
    held.occupy()
    held.queue.submit(0, LATER, kind="a")
    late = held.queue.submit(1, time.monotonic() - 1, kind="a")
    gone = held.queue.submit(2, LATER, kind="a")
    gone.cancel()
    held.queue.submit(3, LATER, kind="a")
    held.go()
    assert held.batches == [[0, 3]]
    with pytest.raises(DeadlineError):
        late.result(0)


def test_a_failure_is_the_failure_of_one() -> None:
    def answer(requests: Sequence[Any]) -> Sequence[Any]:
        if 1 in requests:
            raise ValueError("one is wrong")
        return requests

    held = Held(answer)
    held.occupy()
    futures = [held.queue.submit(n, LATER, kind="a") for n in range(3)]
    held.go()
    assert [futures[n].result(0) for n in (0, 2)] == [0, 2]
    with pytest.raises(ValueError, match="one is wrong"):
        futures[1].result(0)


def test_closing_answers_what_waits_and_takes_nothing_more() -> None:
    held = Held(same)
    (busy,) = held.occupy()
    future = held.queue.submit(1, LATER)
    held.go()
    assert busy.result(0) == ("busy", 0)
    assert future.result(0) == 1
    with pytest.raises(BusyError, match="shutting down"):
        held.queue.submit(2, LATER)
