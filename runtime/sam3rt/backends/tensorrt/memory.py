"""Device and pinned memory with owners, and how tensors lie in it.

When an owner dies, its memory is queued, and given back at the next call into the backend. It is
not given back on the spot: Python may collect an object at any moment and in any thread, and CUDA
forbids freeing memory while a graph is being recorded.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from .cuda import Cuda

ALIGNMENT = 256
# Feature maps of one model are all of one size: a few spare blocks save cudaMalloc and cudaFree,
# which halt the device, at every image.
_SPARE_BLOCKS = 4


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
    """Device memory whose owner may be gone.

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

    def __init__(self, memory: Memory, allocation: _Allocation) -> None:
        # The memory pool must outlive what is given back to it.
        self._memory = memory
        self._allocation = allocation
        self.address = allocation.address
        self.nbytes = allocation.nbytes

    def mark_exported(self) -> None:
        """Another library is given the address: the memory is never used again without a halt.

        A consumer says that it is done when its work is queued, not when it has run.
        """
        self._allocation.exported = True


class PinnedBuffer:
    """Pinned host memory, given back after this object dies.

    Attributes:
        array: uint8 [nbytes].
    """

    def __init__(self, memory: Memory, array: NDArray[np.uint8]) -> None:
        self._memory = memory
        self.array = array


class _SpareBlocks:
    """Freed blocks that are kept for the next ones of their size."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._lock = threading.Lock()
        self._blocks: dict[int, list[_Allocation]] = {}

    def take(self, nbytes: int) -> _Allocation | None:
        with self._lock:
            blocks = self._blocks.get(nbytes)
            return blocks.pop() if blocks else None

    def keep(self, allocation: _Allocation) -> None:
        """Keep memory for the next block, or give it back where there is enough.

        Memory that was exported is always given back: that waits until the device is idle.
        """
        if not allocation.exported:
            with self._lock:
                blocks = self._blocks.setdefault(allocation.nbytes, [])
                if len(blocks) < _SPARE_BLOCKS:
                    blocks.append(allocation)
                    return
        self._cuda.free(allocation.address)

    def free_all(self) -> None:
        with self._lock:
            spare = [allocation for blocks in self._blocks.values() for allocation in blocks]
            self._blocks.clear()
        for allocation in spare:
            self._cuda.free(allocation.address)


class _Returns:
    """What dead owners left, until it is given back.

    Attributes:
        spare: blocks that are kept for the next ones.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.spare = _SpareBlocks(cuda)
        self._cuda = cuda
        # A deque's append needs no lock, so it can be called wherever an object dies.
        self._left: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_closed = False

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

    def close(self) -> None:
        """Give back everything, now and from now on.

        Objects that die in one cycle are finalized in any order, so that some may follow. The
        device may be lost by then, and nobody can act on that.
        """
        self._is_closed = True
        with contextlib.suppress(BackendError), self._cuda.active():
            self.give_back()
            self.spare.free_all()


class Memory:
    """Hands out what a GPU has, and takes it back.

    Args:
        cuda: the GPU.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._returns = _Returns(cuda)
        weakref.finalize(self, self._returns.close).atexit = False

    def allocate(self, nbytes: int) -> Block:
        """Device memory.

        Raises:
            BackendError: there is not enough; spare blocks have been given back by then.
        """
        block = Block(self, _Allocation(self._obtain(nbytes), nbytes))
        self.give_back_after(block, self._cuda.free, block.address)
        return block

    def allocate_reusable(self, nbytes: int) -> Block:
        """Device memory that becomes a spare block when its owner dies.

        Raises:
            BackendError: see :meth:`allocate`.
        """
        self.collect()
        allocation = self._returns.spare.take(nbytes) or _Allocation(self._obtain(nbytes), nbytes)
        block = Block(self, allocation)
        self.give_back_after(block, self._returns.spare.keep, allocation)
        return block

    def allocate_pinned(self, nbytes: int) -> PinnedBuffer:
        """Pinned host memory."""
        self.collect()
        buffer = PinnedBuffer(self, self._cuda.allocate_host(nbytes))
        self.give_back_after(buffer, self._cuda.free_host, buffer.array)
        return buffer

    def give_back_after(self, owner: object, give_back: Callable[[Any], None], what: Any) -> None:
        """Call ``give_back(what)`` some time after the owner has died."""
        weakref.finalize(owner, self._returns.add, give_back, what).atexit = False

    def collect(self) -> None:
        """Give back what dead owners left. Nothing queued on a stream may still use it."""
        self._returns.give_back()

    def _obtain(self, nbytes: int) -> int:
        self.collect()
        try:
            return self._cuda.allocate(nbytes)
        except BackendError:
            self._returns.spare.free_all()
            return self._cuda.allocate(nbytes)


class GrowingBuffer:
    """Device and pinned memory that is replaced when more is needed.

    Args:
        memory: gives it.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._block: Block | None = None
        self._pinned: PinnedBuffer | None = None

    def block(self, nbytes: int) -> Block:
        """Device memory of at least that size. The stream must be idle if it is larger."""
        if self._block is None or self._block.nbytes < nbytes:
            self._block = None
            self._block = self._memory.allocate(nbytes)
        return self._block

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory of that size."""
        if self._pinned is None or len(self._pinned.array) < nbytes:
            self._pinned = None
            self._pinned = self._memory.allocate_pinned(nbytes)
        return self._pinned.array[:nbytes]


def aligned(nbytes: int) -> int:
    """The next multiple of TensorRT's alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
