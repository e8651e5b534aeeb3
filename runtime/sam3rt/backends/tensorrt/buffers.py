"""Buffers of a lane: grown when more is needed, or at addresses that recorded runs keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .memory import Block, Memory

T = TypeVar("T")

# Calls after which a buffer is replaced by a smaller one, if none of them needed half of it.
_CALLS_BEFORE_SHRINKING = 64


class _Lasting(Generic[T]):
    """Memory as large as it has lately had to be.

    Args:
        allocate: gives it.
    """

    def __init__(self, allocate: Callable[[int], T]) -> None:
        self._allocate = allocate
        self._memory: T | None = None
        self._nbytes = 0
        self._peak = 0
        self._calls = 0

    def get(self, nbytes: int) -> T:
        """Memory of at least that size. The last one's content is lost if it is another."""
        self._peak = max(self._peak, nbytes)
        self._calls += 1
        wanted = max(self._nbytes, nbytes)
        if self._calls == _CALLS_BEFORE_SHRINKING:
            if self._peak <= self._nbytes // 2:
                wanted = self._peak
            self._peak = self._calls = 0
        if self._memory is None or wanted != self._nbytes:
            # What cannot be had leaves nothing behind: the next call may ask for less.
            self._memory, self._nbytes = None, 0
            self._memory = self._allocate(wanted)
            self._nbytes = wanted
        return self._memory


class GrowingBuffer:
    """Device and pinned memory that is replaced when more is needed, or lately much less was.

    Args:
        memory: gives it.
    """

    def __init__(self, memory: Memory) -> None:
        self._block = _Lasting(memory.allocate)
        self._pinned = _Lasting(memory.allocate_pinned)

    def block(self, nbytes: int) -> Block:
        """Device memory of at least that size. Nothing may be queued that uses the last one."""
        return self._block.get(nbytes)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory of that size."""
        return self._pinned.get(nbytes)[:nbytes]


class Workspace:
    """Device memory by name, whose addresses recorded runs keep.

    Args:
        memory: gives it.

    Attributes:
        generation: rises whenever something moves, which makes runs recorded before worthless.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._blocks: dict[str, Block] = {}
        self.generation = 0

    def fit(self, **sizes: int) -> None:
        """Have room for so many bytes under each name. The stream must be idle.

        Raises:
            BackendError: there is not enough device memory.
        """
        for name, nbytes in sizes.items():
            block = self._blocks.get(name)
            if block is None or block.nbytes < nbytes:
                self.generation += 1
                self._blocks.pop(name, None)
                del block
                self._blocks[name] = self._memory.allocate(max(1, nbytes))

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]
