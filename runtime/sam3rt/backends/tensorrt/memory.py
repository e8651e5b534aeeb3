"""Device and pinned memory with owners, and how tensors lie in it.

When an owner dies, its memory is queued, and given back at the next call into the backend. It is
not given back on the spot: Python may collect an object at any moment and in any thread, and CUDA
forbids freeing memory while a graph is being recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from .cuda import Cuda, out_of_memory

ALIGNMENT = 256
# Feature maps of one model are all of one size: a few spare blocks save cudaMalloc and cudaFree,
# which halt the device, at every image. Images are of many sizes: spare blocks are kept for the
# sizes used last.
_SPARE_BLOCKS, _SPARE_SIZES = 4, 3
# Masks and logits of a call lie in pinned memory that is the caller's until it drops them: to copy
# them to other memory takes half of a click's time. Beyond so many bytes they are copied all the
# same.
_MOST_LENT = 256 << 20
# Callers drop the results of many calls at once, and have them of several sizes. Each new piece
# takes milliseconds of pinning.
_SPARE_LENT_BLOCKS, _SPARE_LENT_SIZES = 64, 8


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a block.

    Attributes:
        offset: from the block's start, bytes.
        shape: sizes.
        dtype: element type.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, block: NDArray[np.uint8], start: int = 0) -> NDArray[Any]:
        """The tensor in a host copy of the block that begins at ``start``."""
        first = self.offset - start
        return block[first : first + self.nbytes].view(self.dtype).reshape(self.shape)


class Layout:
    """Several tensors in one block, each where TensorRT can read it.

    Args:
        tensors: name, shape and type of each, in order.

    Attributes:
        slots: where each lies, by name.
        nbytes: size of the block.
    """

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> None:
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, shape, dtype in tensors:
            slot = Slot(aligned(end), shape, dtype)
            self.slots[name] = slot
            end = slot.offset + slot.nbytes
        self.nbytes = end

    def span(self, names: Iterable[str]) -> tuple[int, int]:
        """First and last byte, exclusive, of the shortest part that holds the named tensors."""
        slots = [self.slots[name] for name in names]
        return min(s.offset for s in slots), max(s.offset + s.nbytes for s in slots)


@dataclass
class _Allocation:
    """Memory whose owner may be gone.

    Attributes:
        address: where it begins.
        nbytes: its size.
        exported: whether another library may still be reading it on a stream of its own.
    """

    address: int
    nbytes: int
    exported: bool = False


class Block:
    """Device memory, given back after this object dies.

    Attributes:
        address: where it begins.
        nbytes: its size.
    """

    def __init__(self, allocation: _Allocation) -> None:
        self._allocation = allocation
        self.address = allocation.address
        self.nbytes = allocation.nbytes

    def mark_exported(self) -> None:
        """Another library is given the address: the memory is never used again without a halt.

        A consumer says that it is done when its work is queued, not when it has run.
        """
        self._allocation.exported = True


class _Pinned:
    """Pinned host memory: the base of every array over it, given back after the last one dies.

    Attributes:
        __array_interface__: what NumPy makes an array from.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


class _Heap:
    """Memory of one kind, of which no more than a limit is taken.

    Args:
        allocate: takes so many bytes; the address.
        free: gives an address back.
        limit: bytes, at most; ``None`` for what there is.
        other: a heap that takes the same memory where GPU and host share it.
        spares: blocks of one size, and sizes, that are kept at most.
    """

    def __init__(
        self,
        allocate: Callable[[int], int],
        free: Callable[[int], None],
        limit: int | None = None,
        other: _Heap | None = None,
        spares: tuple[int, int] = (_SPARE_BLOCKS, _SPARE_SIZES),
    ) -> None:
        self._allocate = allocate
        self._free = free
        self._limit = limit
        self._other = other
        self._most_blocks, self._most_sizes = spares
        self._lock = threading.Lock()
        self._used = 0
        # What was given back and is kept for the next ones of its size; the size used last stands
        # last.
        self._spare: OrderedDict[int, list[_Allocation]] = OrderedDict()

    def take(self, nbytes: int, *, reuses: bool = False) -> _Allocation:
        """Memory: spare memory where that may be, else new. Where that is short, none stays spare.

        Raises:
            BackendError: there is not enough.
        """
        with self._lock:
            spare = self._spare.get(nbytes) if reuses else None
            if spare:
                return spare.pop()
        try:
            return self._take_new(nbytes)
        except BackendError:
            self.free_spare()
            if self._other is not None:
                self._other.free_spare()
            return self._take_new(nbytes)

    def _take_new(self, nbytes: int) -> _Allocation:
        with self._lock:
            if self._limit is not None and self._used + nbytes > self._limit:
                raise out_of_memory(nbytes, self._limit - self._used, self._limit, "its limit")
            self._used += nbytes
        try:
            return _Allocation(self._allocate(nbytes), nbytes)
        except BaseException:
            with self._lock:
                self._used -= nbytes
            raise

    def free(self, allocation: _Allocation) -> None:
        with self._lock:
            self._used -= allocation.nbytes
        self._free(allocation.address)

    def keep(self, allocation: _Allocation) -> None:
        """Keep memory for the next one of its size, or give it back where there is enough.

        Memory that was exported is always given back: that waits until the device is idle.
        """
        surplus = [allocation]
        if not allocation.exported:
            with self._lock:
                spare = self._spare.setdefault(allocation.nbytes, [])
                self._spare.move_to_end(allocation.nbytes)
                if len(spare) < self._most_blocks:
                    spare.append(surplus.pop())
                if len(self._spare) > self._most_sizes:
                    surplus += self._spare.popitem(last=False)[1]
        for unneeded in surplus:
            self.free(unneeded)

    def free_spare(self) -> None:
        with self._lock:
            spare = [allocation for kept in self._spare.values() for allocation in kept]
            self._spare.clear()
        for allocation in spare:
            self.free(allocation)


class _Returns:
    """What dead owners left, until it is given back.

    Args:
        cuda: the GPU.
        heaps: whose spare memory is given back at the end.
    """

    def __init__(self, cuda: Cuda, heaps: Iterable[_Heap]) -> None:
        self._cuda = cuda
        self._heaps = tuple(heaps)
        # A deque's append needs no lock, so it can be called wherever an object dies.
        self._left: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_closed = False
        self._turn = threading.Lock()

    def add(self, give_back: Callable[[Any], None], what: Any) -> None:
        """Queue a call; once closed, make it now."""
        self._left.append((give_back, what))
        if self._is_closed:
            self.close()

    def give_back(self) -> None:
        while True:
            try:
                give_back, what = self._left.popleft()
            except IndexError:
                return
            give_back(what)

    def release_spare(self) -> None:
        self.give_back()
        for heap in self._heaps:
            heap.free_spare()

    def close(self) -> None:
        """Give back everything, now and from now on."""
        self._is_closed = True
        # Objects that die meanwhile come here, too, in this thread or another. They wait for no
        # turn: whoever has it looks again before it is done.
        while self._turn.acquire(blocking=False):
            try:
                with self._cuda.active():
                    self.release_spare()
            except BackendError:  # the device is lost, and nobody can act on that
                return
            finally:
                self._turn.release()
            if not self._left:
                return


class Memory:
    """Hands out what a GPU has, and takes it back.

    Args:
        cuda: the GPU.
        limit: bytes of device memory that are taken at most; ``None`` for what there is.

    Attributes:
        cuda: the same.
    """

    def __init__(self, cuda: Cuda, limit: int | None = None) -> None:
        self.cuda = cuda

        def pin(nbytes: int) -> int:
            return int(cuda.allocate_host(nbytes).ctypes.data)

        self._pinned = _Heap(pin, cuda.free_host)
        lent = _SPARE_LENT_BLOCKS, _SPARE_LENT_SIZES
        self._lent = _Heap(pin, cuda.free_host, _MOST_LENT, spares=lent)
        self._device = _Heap(cuda.allocate, cuda.free, limit, self._lent)
        self._returns = _Returns(cuda, (self._device, self._lent))
        weakref.finalize(self, self._returns.close).atexit = False

    def allocate(self, nbytes: int) -> Block:
        """Device memory.

        Raises:
            BackendError: there is not enough; spare blocks have been given back by then.
        """
        self.collect()
        return self._block(self._device.take(nbytes), self._device.free)

    def allocate_reusable(self, nbytes: int) -> Block:
        """Device memory that becomes a spare block when its owner dies.

        Raises:
            BackendError: see :meth:`allocate`.
        """
        self.collect()
        return self._block(self._device.take(nbytes, reuses=True), self._device.keep)

    def allocate_pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned host memory, uint8 [nbytes]."""
        self.collect()
        return self._array(self._pinned.take(nbytes), nbytes, self._pinned.free)

    def lend(self, nbytes: int) -> NDArray[np.uint8] | None:
        """Pinned host memory that the caller keeps as long as any array over it lives.

        Returns:
            uint8 [nbytes], or ``None`` where too much is lent already.
        """
        self.collect()
        # In steps of a megabyte, so that calls of similar sizes share spare memory.
        size = -(-nbytes >> 20) << 20
        try:
            allocation = self._lent.take(size, reuses=True)
        except BackendError:
            return None
        return self._array(allocation, nbytes, self._lent.keep)

    def give_back_after(
        self, owner: object, give_back: Callable[[Any], None], what: Any
    ) -> Callable[[], object]:
        """Call ``give_back(what)`` some time after the owner has died.

        Returns:
            What to call for it to be given back without waiting for that.
        """
        finalizer = weakref.finalize(owner, self._returns.add, give_back, what)
        finalizer.atexit = False
        return finalizer

    def collect(self) -> None:
        """Give back what dead owners left. Nothing queued on a stream may still use it."""
        self._returns.give_back()

    def close(self) -> None:
        """Give back all that nobody owns, and from now on whatever its owner leaves at once."""
        self._returns.close()

    def _block(self, allocation: _Allocation, give_back: Callable[[_Allocation], None]) -> Block:
        block = Block(allocation)
        self.give_back_after(block, give_back, allocation)
        return block

    def _array(
        self, allocation: _Allocation, nbytes: int, give_back: Callable[[_Allocation], None]
    ) -> NDArray[np.uint8]:
        owner = _Pinned(allocation.address, nbytes)
        self.give_back_after(owner, give_back, allocation)
        return np.asarray(owner)


def aligned(nbytes: int) -> int:
    """The next multiple of TensorRT's alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
