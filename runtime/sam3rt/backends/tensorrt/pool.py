"""The lanes of a backend, which its threads take turns on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...errors import BackendError
from .cuda import Cuda
from .lane import Lane
from .memory import Block, Memory

_LOG = logging.getLogger(__name__)

# After another lane could not be made, for lack of memory, callers share those there are for this
# long before the next try.
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
                with self._changed:
                    self._free.append(lane)
                    self._changed.notify_all()

    def _take(self, encode: bool, holding: Block | None) -> Lane:
        while True:
            with self._changed:
                lane = self._best(encode, holding)
                while lane is None and (encode or not self._may_grow()):
                    self._changed.wait()
                    lane = self._best(encode, holding)
                if lane is not None:
                    self._free.remove(lane)
                    return lane
                self._count += 1
            try:
                return self._make(False)
            except BackendError as error:
                with self._changed:
                    self._count -= 1
                    self._retry_at = time.monotonic() + _RETRY_SECONDS
                    self._changed.notify_all()
                # As text: a kept traceback would keep alive what was allocated.
                _LOG.warning("no more than %d calls at a time: %s", self._count, str(error))

    def _may_grow(self) -> bool:
        return self._count < self._limit and time.monotonic() >= self._retry_at

    def _best(self, encode: bool, holding: Block | None) -> Lane | None:
        """A free lane: the one that holds the maps, else the decoder lane unused for longest."""
        usable = [lane for lane in self._free if lane.encodes or not encode]
        if holding is not None:
            for lane in usable:
                if lane.holds(holding):
                    return lane
        return min(usable, key=lambda lane: lane.encodes, default=None)
