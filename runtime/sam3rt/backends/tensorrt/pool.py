"""The lanes of a backend, which its threads take turns on, and the feature maps they leave."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, StateError
from ...features import DeviceArray, Features
from ..kept import CLOSED, check_fork
from .cuda import OutOfDeviceMemoryError
from .encoder import EncoderLane
from .imaging import DeviceImaging
from .lane import Lane
from .memory import Block, Layout, Memory
from .network import Network

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

# After memory was too short for a lane, callers share those there are for this long before the
# next try.
_RETRY_SECONDS = 10.0


class LanePool:
    """Lanes for many threads: one with the encoder, and decoder lanes as threads need them.

    Args:
        network: the engines.
        memory: of the GPU.
        imaging: pre- and postprocessing on the device.
        limit: lanes at most.

    Attributes:
        cuda: the GPU.

    Raises:
        BackendError: there is not enough device memory for the encoder lane.
    """

    def __init__(
        self, network: Network, memory: Memory, imaging: DeviceImaging, limit: int
    ) -> None:
        self._make: Callable[[], Lane] = partial(Lane, network, memory, imaging)
        self.cuda = memory.cuda
        self._memory = memory
        self._limit = limit
        self._process = os.getpid()
        self._changed = threading.Condition()
        # The one used last stands last.
        self._free: list[Lane] = [EncoderLane(network, memory, imaging)]
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
            StateError: the pool is closed, or this process inherited it by a fork.
        """
        while True:
            with self.lane(encode=encode, holding=holding) as lane:
                try:
                    return use(lane)
                except OutOfDeviceMemoryError as error:
                    if not self._give_up_one(lane, error):
                        raise

    def run_encoder(self, use: Callable[[EncoderLane], T]) -> T:
        """Use the lane with the encoder; see :meth:`run`."""
        return self.run(cast(Callable[[Lane], T], use), encode=True)

    @contextmanager
    def lane(self, *, encode: bool = False, holding: Block | None = None) -> Iterator[Lane]:
        """A lane for this thread alone; waits until there is one.

        Inside, the GPU is the thread's current one.

        Args:
            encode: whether it has to encode.
            holding: feature maps that are best in its buffers already.
        """
        self.check_process()
        with self.cuda.active():
            self._memory.collect()
            lane = self._take(encode, holding)
            try:
                yield lane
            finally:
                self._put_back(lane)

    def each(self, use: Callable[[Lane], None]) -> None:
        """Use every lane that no call is using, and make as many as there may be.

        With little memory, fewer.

        Raises:
            BackendError: there is not even enough for the encoder lane.
        """
        lanes: list[Lane] = []
        with self.cuda.active():
            self._memory.collect()
            try:
                while (lane := self._take_if_free()) is not None:
                    lanes.append(lane)
                    use(lane)
            except OutOfDeviceMemoryError as error:
                if lanes[-1].encodes:
                    raise
                self._give_up(lanes[-1], error)
            finally:
                for lane in lanes:
                    self._put_back(lane)

    def check_process(self) -> None:
        """Refuse to work in a process that inherited the GPU's memory, which is not there.

        Raises:
            StateError: the process was forked after the model was loaded.
        """
        check_fork(self._process)

    def close(self) -> None:
        """Wait for the calls that are under way, and let go of all lanes and engines.

        Embeddings keep their memory until they die. That the GPU is lost is no error here.
        """
        with ExitStack() as stack:
            # TensorRT gives its own memory back on the thread's current GPU.
            with suppress(BackendError):
                stack.enter_context(self.cuda.active())
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
                while len(self._free) < self._count:
                    self._changed.wait()
                self._free.clear()
                self._count = 0
                # It holds the engines.
                self.__dict__.pop("_make", None)

    def _take(self, encode: bool, holding: Block | None) -> Lane:
        while True:
            lane = self._take_if_free(encode, holding)
            if lane is not None:
                return lane
            with self._changed:
                while not (self._best(encode, holding) or self._may_grow(encode)):
                    self._check_open()
                    self._changed.wait()

    def _take_if_free(self, encode: bool = False, holding: Block | None = None) -> Lane | None:
        """A lane that no call is using, or a new one; ``None`` where there can be none now."""
        with self._changed:
            self._check_open()
            lane = self._best(encode, holding)
            if lane is not None:
                self._free.remove(lane)
                return lane
            if not self._may_grow(encode):
                return None
            self._count += 1
        return self._grow()

    def _put_back(self, lane: Lane) -> None:
        with self._changed:
            if not lane.is_given_up:
                self._free.append(lane)
            self._changed.notify_all()

    def _may_grow(self, encode: bool) -> bool:
        is_due = time.monotonic() >= self._retry_at
        return not encode and self._count < self._limit and is_due

    def _grow(self) -> Lane | None:
        """Make the lane that was counted, or ``None`` where memory is short."""
        try:
            return self._make()
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
            raise StateError(CLOSED)

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


class DeviceFeatures(Features):
    """One image's feature maps in a device block of their own.

    Args:
        block: where they lie.
        layout: how, finest map first.
        pool: whose lanes can copy them.
    """

    def __init__(self, block: Block, layout: Layout, pool: LanePool) -> None:
        self.block = block
        self.layout = layout
        self.pool = pool

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return self.layout.nbytes

    @property
    def device(self) -> str:
        """Such as ``"cuda:0"``."""
        return f"cuda:{self.pool.cuda.index}"

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""
        host = np.empty(self.layout.nbytes, np.uint8)
        self.pool.run(lambda lane: lane.download(host, self.block))
        return tuple(slot.view(host).astype(np.float32) for slot in self.layout.slots.values())

    def arrays(self) -> tuple[DeviceArray, ...]:
        """The maps where they lie, in the type they have between the engines."""
        self.pool.check_process()
        self.block.mark_exported()
        device = self.pool.cuda.dlpack_device
        return tuple(
            DeviceArray(
                self.block.address + slot.offset, slot.shape, slot.dtype, device, self.block
            )
            for slot in self.layout.slots.values()
        )
