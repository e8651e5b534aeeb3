"""A bounded queue and the threads that work it off, several requests of a kind at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .errors import BusyError, DeadlineError

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(eq=False)
class _Job(Generic[Q, A]):
    request: Q
    kind: Hashable
    size: int
    deadline: float
    future: Future[A] = field(default_factory=Future)


class WorkQueue(Generic[Q, A]):
    """Requests in the order in which they came, each with a deadline.

    A thread that is free takes the oldest request and, with it, its share of those of the same
    kind that are waiting already. Nothing waits for others to come, and what a second free thread
    could do at the same time is left to it, so that working together is never slower than one by
    one.

    Args:
        answer: called on a thread with requests of one kind; returns as many answers.
        name: of the threads.
        threads: how many there are.
        most_waiting: requests that may wait.
        most_together: how much may be taken at once, in sizes of requests.

    Attributes:
        threads: the threads.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Q]], Sequence[A]],
        name: str,
        *,
        threads: int,
        most_waiting: int,
        most_together: int = 1,
    ) -> None:
        self._answer = answer
        self._most_waiting = most_waiting
        self._most_together = most_together
        self._waiting: deque[_Job[Q, A]] = deque()
        self._free = threads
        self._closed = False
        self._changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._work, name=f"{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for a thread."""
        return len(self._waiting)

    def submit(
        self, request: Q, deadline: float, *, kind: Hashable = None, size: int = 1
    ) -> Future[A]:
        """Let a request wait for its turn.

        Args:
            request: what ``answer`` gets.
            deadline: when it is given up if its turn has not come, seconds of ``time.monotonic``.
            kind: requests of equal kinds may be answered together; of ``None``, never.
            size: see ``most_together``.

        Returns:
            The answer to be. Cancelling it takes a request that still waits out of the queue.

        Raises:
            BusyError: too many wait already, or the queue is closed.
        """
        job: _Job[Q, A] = _Job(request, kind, size, deadline)
        with self._changed:
            if self._closed:
                raise BusyError("the service is shutting down")
            if len(self._waiting) >= self._most_waiting:
                # Who has gone or whose time is over does not count.
                self._waiting = deque(other for other in self._waiting if _is_wanted(other))
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{len(self._waiting)} requests are waiting, the most that may")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Answer what is waiting, take nothing more, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                jobs = self._take()
                self._free -= 1
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])
            del jobs  # a thread that waits keeps no images and masks
            with self._changed:
                self._free += 1

    def _take(self) -> list[_Job[Q, A]]:
        """The oldest request and its share of those like it; the lock is held."""
        first = self._waiting.popleft()
        if not _is_wanted(first):
            return []
        taken = [first]
        if first.kind is not None and self._most_together > first.size:
            alike = [job for job in self._waiting if job.kind == first.kind and _is_wanted(job)]
            share = -(-(len(alike) + 1) // self._free)
            room = self._most_together - first.size
            for job in alike[: share - 1]:
                if job.size > room:
                    break
                room -= job.size
                taken.append(job)
                self._waiting.remove(job)
        return taken

    def _run(self, jobs: list[_Job[Q, A]]) -> None:
        if not jobs:
            return
        try:
            answers = self._answer([job.request for job in jobs])
        except BaseException as error:  # whatever it is belongs to those who asked
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            # It may be about one of them: the others get their answers.
            for job in jobs:
                self._run([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(answer)


def _is_wanted(job: _Job[Q, A]) -> bool:
    """Whether a waiting request has neither been cancelled nor run out of time."""
    if job.future.done():
        return False
    if time.monotonic() < job.deadline:
        return True
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(DeadlineError("the request's time was over before its turn came"))
    return False
