"""The lanes of a backend, which its threads take turns on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ...errors import BackendError, StateError
from .cuda import Cuda, OutOfDeviceMemoryError
from .lane import Lane
from .memory import Block, Memory

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

# After memory was too short for a lane, callers share those there are for this long before the
# next try.
_RETRY_SECONDS = 10.0


class LanePool:
    """Lanes for many threads: one with the encoder, and decoder lanes as threads need them.

    Args:
        make: makes a lane, with the encoder or without.
        limit: lanes at most.
        cuda: the GPU.
        memory: its memory.

    Raises:
        BackendError: there is not enough device memory for the encoder lane.
    """

    def __init__(
        self, make: Callable[[bool], Lane], limit: int, cuda: Cuda, memory: Memory
    ) -> None:
        self._make = make
        self._cuda = cuda
        self._memory = memory
        self._limit = limit
        self._changed = threading.Condition()
        # The one used last stands last.
        self._free = [make(True)]
        self._count = 1
        self._retry_at = 0.0
        self._is_closed = False

    def run(
        self, use: Callable[[Lane], T], *, encode: bool = False, holding: Block | None = None
    ) -> T:
        """Use a lane, and return what that returns.

        Where memory is short, a lane that is not needed is given up, and the call made again.

        Args:
            use: what to do with it.
            encode: see :meth:`lane`.
            holding: see :meth:`lane`.

        Raises:
            BackendError: what ``use`` raised.
            StateError: the pool is closed.
        """
        while True:
            with self.lane(encode=encode, holding=holding) as lane:
                try:
                    return use(lane)
                except OutOfDeviceMemoryError as error:
                    if not self._give_up_one(lane, error):
                        raise

    @contextmanager
    def lane(self, *, encode: bool = False, holding: Block | None = None) -> Iterator[Lane]:
        """A lane for this thread alone; waits until there is one.

        Inside, the GPU is the thread's current one.

        Args:
            encode: whether it has to encode.
            holding: feature maps that are best in its buffers already.
        """
        with self._cuda.active():
            self._memory.collect()
            lane = self._take(encode, holding)
            try:
                yield lane
            finally:
                self._put_back(lane)

    def each(self, use: Callable[[Lane], None]) -> None:
        """Use every lane once, and make as many as there may be. With little memory, fewer.

        Raises:
            BackendError: there is not even enough for one.
        """
        done: list[Lane] = []
        while len(done) < self._limit:
            with self._cuda.active():
                self._memory.collect()
                lane = self._next_of(done)
                if lane is None:
                    return
                try:
                    use(lane)
                except OutOfDeviceMemoryError as error:
                    if lane.encodes:
                        raise
                    self._give_up(lane, error)
                    return
                finally:
                    done.append(lane)
                    self._put_back(lane)

    def close(self) -> None:
        """Wait for the calls that are under way, and let go of all lanes and engines.

        Embeddings keep their memory.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            while len(self._free) < self._count:
                self._changed.wait()
            self._free.clear()
            self._count = 0
            # It holds the engines.
            self.__dict__.pop("_make", None)
        with self._cuda.active():
            self._memory.release_spare()

    def _take(self, encode: bool, holding: Block | None) -> Lane:
        while True:
            with self._changed:
                while True:
                    self._check_open()
                    lane = self._best(encode, holding)
                    if lane is not None:
                        self._free.remove(lane)
                        return lane
                    if not encode and self._reserve():
                        break
                    self._changed.wait()
            lane = self._grow()
            if lane is not None:
                return lane

    def _next_of(self, done: list[Lane]) -> Lane | None:
        """A lane that is not done yet, the encoder's first; ``None`` where there can be no more."""
        with self._changed:
            while True:
                self._check_open()
                left = [lane for lane in self._free if lane not in done]
                if left:
                    lane = max(left, key=lambda lane: lane.encodes)
                    self._free.remove(lane)
                    return lane
                if self._count <= len(done):
                    break
                self._changed.wait()
            if not self._reserve():
                return None
        return self._grow()

    def _put_back(self, lane: Lane) -> None:
        with self._changed:
            if not lane.is_given_up:
                self._free.append(lane)
            self._changed.notify_all()

    def _reserve(self) -> bool:
        """Count one lane more, if there may be one."""
        with self._changed:
            if self._count >= self._limit or time.monotonic() < self._retry_at:
                return False
            self._count += 1
            return True

    def _grow(self) -> Lane | None:
        """Make the lane that was counted, or ``None`` where memory is short."""
        try:
            return self._make(False)
        except BaseException as error:
            self._count_one_less(error)
            if isinstance(error, BackendError):
                return None
            raise

    def _give_up_one(self, own: Lane, error: BackendError) -> bool:
        """Give up a lane that nobody uses, or else the caller's own; whether there was one."""
        with self._changed:
            spare = [lane for lane in (*self._free, own) if not lane.encodes]
            if not spare:
                return False
            if spare[0] is not own:
                self._free.remove(spare[0])
            self._give_up(spare[0], error)
            return True

    def _give_up(self, lane: Lane, error: BackendError) -> None:
        lane.is_given_up = True
        self._count_one_less(error)

    def _count_one_less(self, error: BaseException) -> None:
        with self._changed:
            self._count -= 1
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._changed.notify_all()
            # As text: a kept traceback would keep alive what was allocated.
            _LOG.warning("no more than %d calls at a time: %s", self._count, str(error))

    def _check_open(self) -> None:
        if self._is_closed:
            raise StateError("the model is closed")

    def _best(self, encode: bool, holding: Block | None) -> Lane | None:
        """A free lane: the one that holds the maps, else the decoder lane unused for longest."""
        usable = [lane for lane in self._free if lane.encodes or not encode]
        if holding is not None:
            for lane in usable:
                if lane.holds(holding):
                    return lane
        return min(usable, key=lambda lane: lane.encodes, default=None)


def ahead(calls: Sequence[Callable[[], T]]) -> Generator[T, None, None]:
    """Results of calls; while the caller uses one, a thread makes the next. Close it when done."""
    if len(calls) == 1:
        yield calls[0]()
        return
    with ThreadPoolExecutor(1, "sam3rt-ahead") as thread:
        coming = [thread.submit(call) for call in calls[:1]]
        for number in range(1, len(calls) + 1):
            result = coming.pop().result()
            coming += [thread.submit(call) for call in calls[number : number + 1]]
            yield result
