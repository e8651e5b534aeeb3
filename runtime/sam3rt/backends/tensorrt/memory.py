"""Device and pinned memory with owners, and how tensors lie in it.

What an owner leaves behind is queued when the owner dies and given back at the next call into
the backend, not on the spot: Python may collect an object at any moment and in any thread, and
CUDA forbids freeing memory while a graph is being recorded.
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
from .cuda.api import Cuda

ALIGNMENT = 256
# Feature maps of one model are all of one size: a few spare blocks save cudaMalloc and cudaFree,
# which halt the device, at every image.
_SPARE_BLOCKS = 4

_Release = tuple[Callable[[Any], None], Any]


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


class Block:
    """Device memory, given back after this object dies.

    Attributes:
        address: where it begins.
        nbytes: its size.
    """

    def __init__(self, memory: Memory, address: int, nbytes: int) -> None:
        # Whoever has something to give back keeps alive what takes it.
        self._memory = memory
        self.address = address
        self.nbytes = nbytes


class Staging:
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
        self._blocks: dict[int, list[int]] = {}

    def take(self, nbytes: int) -> int | None:
        with self._lock:
            blocks = self._blocks.get(nbytes)
            return blocks.pop() if blocks else None

    def keep(self, block: tuple[int, int]) -> None:
        address, nbytes = block
        with self._lock:
            blocks = self._blocks.setdefault(nbytes, [])
            if len(blocks) < _SPARE_BLOCKS:
                blocks.append(address)
                return
        self._cuda.free(address)

    def free_all(self) -> None:
        with self._lock:
            addresses = [address for blocks in self._blocks.values() for address in blocks]
            self._blocks.clear()
        for address in addresses:
            self._cuda.free(address)


class Memory:
    """Hands out what a GPU has, and takes it back.

    Args:
        cuda: the GPU.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._spare = _SpareBlocks(cuda)
        # A deque's append needs no lock, so it can be called wherever an object dies.
        self._left: deque[_Release] = deque()
        weakref.finalize(self, _give_back_all, cuda, self._left, self._spare).atexit = False

    def allocate(self, nbytes: int) -> Block:
        """Device memory.

        Raises:
            BackendError: there is not enough; spare blocks have been given back by then.
        """
        block = Block(self, self._obtain(nbytes), nbytes)
        self.give_back_after(block, self._cuda.free, block.address)
        return block

    def allocate_reusable(self, nbytes: int) -> Block:
        """Device memory that becomes a spare block when its owner dies.

        Raises:
            BackendError: see :meth:`allocate`.
        """
        self.collect()
        address = self._spare.take(nbytes)
        block = Block(self, self._obtain(nbytes) if address is None else address, nbytes)
        self.give_back_after(block, self._spare.keep, (block.address, nbytes))
        return block

    def staging(self, nbytes: int) -> Staging:
        """Pinned host memory."""
        self.collect()
        staging = Staging(self, self._cuda.allocate_host(nbytes))
        self.give_back_after(staging, self._cuda.free_host, staging.array)
        return staging

    def give_back_after(self, owner: object, give_back: Callable[[Any], None], what: Any) -> None:
        """Call ``give_back(what)`` some time after the owner has died."""
        weakref.finalize(owner, self._left.append, (give_back, what)).atexit = False

    def collect(self) -> None:
        """Give back what dead owners left. Nothing queued on a stream may still use it."""
        _give_back(self._left)

    def _obtain(self, nbytes: int) -> int:
        self.collect()
        try:
            return self._cuda.allocate(nbytes)
        except BackendError:
            self._spare.free_all()
            return self._cuda.allocate(nbytes)


def aligned(nbytes: int) -> int:
    """The next multiple of TensorRT's alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _give_back(left: deque[_Release]) -> None:
    while True:
        try:
            give_back, what = left.popleft()
        except IndexError:
            return
        give_back(what)


def _give_back_all(cuda: Cuda, left: deque[_Release], spare: _SpareBlocks) -> None:
    """The end of a backend. The device may be lost by then, and nobody can act on that."""
    with contextlib.suppress(BackendError):
        cuda.activate()
        _give_back(left)
        spare.free_all()
